"""Runs our model outside the engine, on hand-made plans, so that a gate can look at what the engine hides.

It schedules nothing: the caller says which tokens are computed when. Invariant: every probe run starts with an empty
cache.
"""

import torch

from argosy.cache.cache_format import build_cache_format
from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.config import IN_MODEL_DTYPE, CacheDTypes
from argosy.engine.build_rank import cache_dims
from argosy.kernels import RotaryTable
from argosy.layers.forward_batch import ForwardBatch
from argosy.messages import AdmittedRequest, ScheduledBatch
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.runner.batch_builder import BatchBuilder
from argosy.runner.row_table import RowTable
from argosy.sampling_params import SamplingParams

_BLOCK_SIZE = 16


class ModelProbe:
    """A model with a cache of its own."""

    def __init__(
        self,
        model: DeepseekV32Model,
        config: ModelConfig,
        rotary: RotaryTable,
        cache_dtypes: CacheDTypes = IN_MODEL_DTYPE,
    ) -> None:
        self._model, self._config, self._rotary = model, config, rotary
        self._device = rotary.cos.device
        self._dtype = model.model.embed_tokens.weight.dtype
        self._format = build_cache_format(cache_dtypes, cache_dims(config), self._dtype, self._device)

    @torch.inference_mode()
    def hidden_states(self, prompts: list[list[int]], chunk_size: int) -> list[torch.Tensor]:
        """Final hidden states [T, D] of every prompt, all in one batch, ``chunk_size`` tokens of each a step."""
        cache, batches = self._plan(prompts, chunk_size)
        parts: list[list[torch.Tensor]] = [[] for _ in prompts]
        for rows, num_tokens, batch in batches:
            everything = torch.arange(batch.num_tokens, device=self._device)
            hidden_states = self._model(batch, cache)
            hidden_states = self._model.take_rows(hidden_states, everything, batch.num_tokens)
            for row, part in zip(rows, hidden_states.split(num_tokens), strict=True):
                parts[row].append(part)
        return [torch.cat(part) for part in parts]

    @torch.inference_mode()
    def logits(self, prompts: list[list[int]], chunk_size: int) -> list[torch.Tensor]:
        """Logits [T, vocab_size] float32 at every position."""
        return [self._model.compute_logits(hidden) for hidden in self.hidden_states(prompts, chunk_size)]

    @torch.inference_mode()
    def forward(self, prompt: list[int]) -> torch.Tensor:
        """One forward pass over a whole prompt, nothing sampled: this rank's slice of the hidden states [t, D]."""
        cache, ((_, _, batch),) = self._plan([prompt], len(prompt))
        return self._model(batch, cache)

    @torch.inference_mode()
    def fill_cache(self, prompts: list[list[int]], chunk_size: int) -> MLAKVCache:
        """The cache after the prompts, as this rank holds it."""
        cache, batches = self._plan(prompts, chunk_size)
        for _, _, batch in batches:
            self._model(batch, cache)
        return cache

    @torch.inference_mode()
    def layer_output(self, layer_id: int, hidden_in: torch.Tensor) -> torch.Tensor:
        """What one layer makes of given hidden states [T, D] of one sequence, in one piece."""
        num_tokens = hidden_in.shape[0]
        cache, batches = self._plan([[0] * num_tokens], num_tokens)
        (_, _, batch) = batches[0]
        layer = self._model.model.layers[layer_id]
        hidden_states, delta = layer(hidden_in.to(self._device, self._dtype), None, batch, cache.layer(layer_id))
        return hidden_states + delta

    def _plan(
        self, prompts: list[list[int]], chunk_size: int
    ) -> tuple[MLAKVCache, list[tuple[list[int], list[int], ForwardBatch]]]:
        """An empty cache, and (rows, tokens a row, batch) for every step."""
        longest = max(len(prompt) for prompt in prompts)
        blocks = -(-longest // _BLOCK_SIZE)
        cache = MLAKVCache(
            self._format,
            num_layers=self._config.num_hidden_layers,
            num_blocks=1 + blocks * len(prompts),
            block_size=_BLOCK_SIZE,
            device=self._device,
        )
        table = RowTable(max_num_seqs=len(prompts), max_model_len=longest, block_size=_BLOCK_SIZE)
        builder = BatchBuilder(table, self._rotary, self._device)
        # Blocks are dealt in turns, so that no sequence lies in consecutive ones.
        admitted = [
            AdmittedRequest(
                row,
                str(row),
                prompt,
                len(prompt),
                0,
                [1 + row + i * len(prompts) for i in range(blocks)],
                SamplingParams(),
            )
            for row, prompt in enumerate(prompts)
        ]
        batches = []
        for start in range(0, longest, chunk_size):
            num_left = [min(chunk_size, len(prompt) - start) for prompt in prompts]
            # The scheduler's order: rows with one token first.
            rows = sorted((row for row, left in enumerate(num_left) if left > 0), key=lambda row: num_left[row] != 1)
            num_tokens = [num_left[row] for row in rows]
            batch = ScheduledBatch(
                step=start,
                rows=rows,
                num_computed_tokens=[start] * len(rows),
                num_scheduled_tokens=num_tokens,
                admitted=admitted if start == 0 else [],
                num_tokens=sum(num_tokens),
            )
            table.apply(batch)
            batches.append((rows, num_tokens, builder.build(batch).forward))
        return cache, batches
