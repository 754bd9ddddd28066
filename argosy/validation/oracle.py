"""The independent implementation, behind four questions.

Needs the extra ``test``. It is slow and caches expanded keys and values; it is asked, never built upon. Its known
differences are listed in ``docs/numerics.md``. Invariant: everything it answers is computed in ``dtype`` on the CPU.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What went into one decoder layer and what came out: [T, D] each."""

    hidden_in: torch.Tensor
    hidden_out: torch.Tensor


@dataclass(frozen=True, slots=True)
class OracleTrace:
    """One forward pass over a whole prompt."""

    layers: list[LayerTrace]
    final_hidden: torch.Tensor  # [T, D], after the final norm
    logits: torch.Tensor  # [T, vocab_size]


class Oracle:
    """``transformers`` on the same checkpoint.

    Raises:
        RuntimeError: ``transformers`` is not installed.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise RuntimeError("validation compares with transformers, which is absent: pip install 'argosy[test]'")
        # Imported here, because the engine itself must not need transformers.
        from transformers import DeepseekV32ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self._model = DeepseekV32ForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def trace(self, token_ids: list[int]) -> OracleTrace:
        """Run the whole prompt at once, remembering every layer's input and output."""
        layers: list[LayerTrace] = []

        def remember(
            module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
        ) -> None:
            hidden_out = output[0] if isinstance(output, tuple) else output
            layers.append(LayerTrace(args[0].squeeze(0), hidden_out.squeeze(0)))

        hooks = [layer.register_forward_hook(remember) for layer in self._model.model.layers]
        try:
            input_ids = torch.tensor([token_ids])
            final_hidden = self._model.model(input_ids, use_cache=False).last_hidden_state
            logits = self._model.lm_head(final_hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return OracleTrace(layers, final_hidden.squeeze(0), logits.squeeze(0))

    @torch.inference_mode()
    def greedy(self, token_ids: list[int], num_tokens: int, num_valid_tokens: int) -> list[int]:
        """The next ``num_tokens`` tokens among the first ``num_valid_tokens`` ids, end-of-sequence ignored."""
        input_ids = torch.tensor([token_ids])
        generated = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=list(range(num_valid_tokens, self._model.config.vocab_size)) or None,
        )
        return generated[0, len(token_ids) :].tolist()
