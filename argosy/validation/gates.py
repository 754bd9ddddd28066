"""The oracle gates: what is compared, how, and what must hold.

Each gate measures one thing and never raises because a measurement is bad. Invariant: a gate that passes has measured
something; there is no default result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from argosy.config import IN_MODEL_DTYPE
from argosy.engine.build import BuiltEngine
from argosy.engine.request import Request
from argosy.sampling_params import SamplingParams
from argosy.validation.oracle import Oracle, OracleTrace
from argosy.validation.probe import ModelProbe

LAYER_COSINE = 0.999  # the bring-up plan's gate, teacher-forced
FINAL_COSINE = 0.98  # likewise, free-running
FP32_DIFFERENCE = 1e-4  # float32 against float32, relative to the largest value


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """One line of the table. ``threshold`` is None for a figure that is only reported."""

    name: str
    measured: float
    threshold: float | None
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GateInputs:
    """What the gates compare with what."""

    engine: BuiltEngine
    oracle: Oracle
    prompts: list[list[int]]  # of different lengths; the longest first

    def build_probe(self) -> ModelProbe:
        runner = self.engine.core.runner
        cache_dtypes = self.engine.config.cache_dtypes
        return ModelProbe(runner.model, self.engine.model_config, runner.rotary, cache_dtypes)

    @property
    def is_float32(self) -> bool:
        """Throughout: an 8-bit cache has bfloat16's trouble, and more of it."""
        return self.engine.config.dtype == "float32" and self.engine.config.cache_dtypes == IN_MODEL_DTYPE


def run_gates(inputs: GateInputs, *, greedy_lengths: tuple[int, ...] = (20, 200)) -> Iterator[GateResult]:
    """Every gate in turn. In bfloat16, differences and tokens are reported, not judged: two correct bfloat16 programs
    choose different experts and different top-k positions wherever scores nearly tie."""
    trace = inputs.oracle.trace(inputs.prompts[0])
    yield from _layer_gates(inputs, trace)
    yield _final_hidden_gate(inputs, trace)
    for name, chunk_size in _prefill_ways(len(inputs.prompts[0])):
        yield _logits_gate(inputs, trace, name, chunk_size)
    yield _mixed_batch_gate(inputs)
    for num_tokens in greedy_lengths:
        yield _greedy_gate(inputs, num_tokens)


def _prefill_ways(num_tokens: int) -> list[tuple[str, int]]:
    return [("full", num_tokens), ("chunked by 37", 37), ("one token at a time", 1)]


def _layer_gates(inputs: GateInputs, trace: OracleTrace) -> Iterator[GateResult]:
    probe = inputs.build_probe()
    cosines, differences = [], []
    for layer_id, layer in enumerate(trace.layers):
        out = probe.layer_output(layer_id, layer.hidden_in).cpu()
        cosines.append(_cosine(out, layer.hidden_out))
        differences.append(_difference(out, layer.hidden_out))
    worst = min(range(len(cosines)), key=cosines.__getitem__)
    yield _at_least("layers, teacher-forced: cosine", cosines[worst], LAYER_COSINE, f"worst of {len(cosines)}: {worst}")
    yield _at_most(
        "layers, teacher-forced: difference",
        max(differences),
        FP32_DIFFERENCE if inputs.is_float32 else None,
        "relative",
    )


def _final_hidden_gate(inputs: GateInputs, trace: OracleTrace) -> GateResult:
    prompt = inputs.prompts[0]
    (hidden,) = inputs.build_probe().hidden_states([prompt], len(prompt))
    cosine = _cosine(hidden.cpu(), trace.final_hidden)
    return _at_least("final hidden, free-running: cosine", cosine, FINAL_COSINE, f"{len(prompt)} tokens")


def _logits_gate(inputs: GateInputs, trace: OracleTrace, name: str, chunk_size: int) -> GateResult:
    (logits,) = inputs.build_probe().logits([inputs.prompts[0]], chunk_size)
    return _judge_logits(inputs, f"logits, {name} prefill", [(logits, trace.logits)])


def _mixed_batch_gate(inputs: GateInputs) -> GateResult:
    ours = inputs.build_probe().logits(inputs.prompts, 29)
    theirs = [inputs.oracle.trace(prompt).logits for prompt in inputs.prompts]
    lengths = ", ".join(str(len(prompt)) for prompt in inputs.prompts)
    return _judge_logits(inputs, f"logits, batch of lengths {lengths}", list(zip(ours, theirs, strict=True)))


def _judge_logits(inputs: GateInputs, name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> GateResult:
    difference = max(_difference(ours.cpu(), theirs) for ours, theirs in pairs)
    threshold = FP32_DIFFERENCE if inputs.is_float32 else None
    return _at_most(f"{name}: difference", difference, threshold, "relative")


def _greedy_gate(inputs: GateInputs, num_tokens: int) -> GateResult:
    prompt = inputs.prompts[-1]
    expected = inputs.oracle.greedy(prompt, num_tokens, inputs.engine.tokenizer.vocab_size)
    found = _greedy(inputs.engine, prompt, num_tokens)
    same = next((i for i in range(num_tokens) if found[i] != expected[i]), num_tokens)
    threshold = float(num_tokens) if inputs.is_float32 else None
    return _at_least(f"{num_tokens} greedy tokens: equal before the first difference", float(same), threshold, "tokens")


def _greedy(engine: BuiltEngine, prompt: list[int], num_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.core.add(Request("validate", prompt, params, engine.model_config.eos_token_ids))
    tokens: list[int] = []
    while engine.core.has_unfinished():
        for delta in engine.core.step():
            tokens += delta.new_token_ids
    return tokens


def _at_least(name: str, measured: float, threshold: float | None, detail: str) -> GateResult:
    return _judge(name, measured, threshold, detail, lambda limit: measured >= limit)


def _at_most(name: str, measured: float, threshold: float | None, detail: str) -> GateResult:
    return _judge(name, measured, threshold, detail, lambda limit: measured <= limit)


def _judge(
    name: str, measured: float, threshold: float | None, detail: str, holds: Callable[[float], bool]
) -> GateResult:
    # NaN fails every comparison, so it never passes; a figure without a threshold must at least be a number.
    passed = measured == measured if threshold is None else holds(threshold)
    return GateResult(name=name, measured=measured, threshold=threshold, passed=passed, detail=detail)


def _cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of all numbers together, as the bring-up plan has it: in bfloat16 single tokens take other experts and positions.

    The worst token is judged by the difference, in float32.
    """
    return F.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0).item()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value (at least 1)."""
    scale = max(1.0, theirs.abs().max().item())
    return (ours.double() - theirs.double()).abs().max().item() / scale
