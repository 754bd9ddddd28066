"""Which part of the model a kernel belongs to: by its name where only one part has it, else by the module that runs it.

Linears of all parts share kernels, so while a model runs eagerly each module starts a marker on the device, and the
trace tells whose kernels lie between. A replayed graph has the same kernels in the same order and no markers: the n-th
call of a name, counted from the step's end, belongs to the same part there. Invariant: nothing in the model is changed
but forward hooks, which are taken off again.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.steps.trace import Span, record

MARKER = "erfinv"  # an operation that no model computes
OUTSIDE = "sampling and inputs"
UNKNOWN = "unknown"
# The first that occurs in the name. What is in no list is its module's.
PART_OF_NAME = (
    ("Memcpy", "copies"),
    ("Memset", "copies"),
    ("_quantize_queries", "indexer"),
    ("_score_", "indexer"),
    ("_select_", "top-k"),
    ("attend", "core"),
    ("_join_", "core"),
    ("_write_latent", "rope and cache"),
    ("_write_index_k", "rope and cache"),
    ("_rope_", "rope and cache"),
    ("_route_", "router"),
    ("_copy_rows", "arrange"),
    ("_count_chunks", "arrange"),
    ("_sum_chunks", "arrange"),
    ("_copy_chunk_rows", "arrange"),
    ("_arrange_few", "arrange"),
    ("_find_in_blocks", OUTSIDE),
    ("_find_block_kernel", OUTSIDE),
    ("_look_up", OUTSIDE),
    ("_pack_r", "arrange"),
    ("_count_routes", "arrange"),
    ("norm_quantize", "norms"),
    ("_quantize", "quantise"),
    ("_rms_norm", "norms"),
)
_LAYER = r"model\.layers\.\d+"
# The first that matches a module's whole name; modules in no line are their parent's.
PART_OF_MODULE = (
    (r"model\.embed_tokens", OUTSIDE),
    (r"lm_head", "head"),
    (r"model\.norm", "norms"),
    (rf"{_LAYER}", "norms"),
    (rf"{_LAYER}\.(input|post_attention)_layernorm", "norms"),
    (rf"{_LAYER}\.self_attn\.\w+_layernorm", "norms"),
    (rf"{_LAYER}\.self_attn\.indexer\.\w+", "indexer"),
    (rf"{_LAYER}\.self_attn", "attention projections"),
    (rf"{_LAYER}\.mlp\.gate", "router"),
    (rf"{_LAYER}\.mlp\.experts", "experts"),
    (rf"{_LAYER}\.mlp\.shared_experts", "shared"),
)
_MLP = re.compile(rf"{_LAYER}\.mlp")


@dataclass(frozen=True, slots=True)
class LabelledSpan:
    span: Span
    part: str


@dataclass(slots=True)
class Labels:
    """Parts of one step's calls of each kernel, by its name, in their order."""

    parts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, labelled: Sequence[LabelledSpan]) -> "Labels":
        labels = cls()
        for each in labelled:
            labels.parts[each.span.name].append(each.part)
        return labels

    def apply(self, step: Sequence[Span]) -> list[LabelledSpan]:
        """To a step that was replayed. Calls that it has more of come first: they fill the recording's inputs."""
        surplus: dict[str, int] = defaultdict(int)
        for span in step:
            surplus[span.name] += 1
        for name in surplus:
            surplus[name] -= len(self.parts.get(name, []))
        seen: dict[str, int] = defaultdict(int)
        labelled = []
        for span in step:
            labelled.append(LabelledSpan(span, self._part(span.name, seen[span.name] - surplus[span.name])))
            seen[span.name] += 1
        return labelled

    def _part(self, name: str, number: int) -> str:
        parts = self.parts.get(name)
        if not parts:
            return part_of_name(name) or UNKNOWN
        return parts[number] if number >= 0 else OUTSIDE


def part_of_name(name: str) -> str | None:
    return next((part for text, part in PART_OF_NAME if text in name), None)


def part_of_module(name: str, module: nn.Module) -> str | None:
    if _MLP.fullmatch(name):
        return "arrange" if "experts" in dict(module.named_children()) else "dense MLP"
    return next((part for pattern, part in PART_OF_MODULE if re.fullmatch(pattern, name)), None)


def label_run(model: nn.Module, run: Callable[[], object], device: torch.device) -> list[LabelledSpan]:
    """Spans of an eager ``run`` of the model, without the markers."""
    with _marking(model, device) as started:
        spans = record(run, device.type)
    return label(spans, started)


def label(spans: Sequence[Span], parts_after: Sequence[str]) -> list[LabelledSpan]:
    """``parts_after``: for each marker, the part that runs behind it. By names alone where markers are missing."""
    num_markers = sum(MARKER in span.name for span in spans)
    if num_markers != len(parts_after):
        print(f"    {num_markers} markers in the trace of {len(parts_after)}: parts are known by kernels' names alone")
        return [LabelledSpan(span, part_of_name(span.name) or UNKNOWN) for span in spans]
    parts, current = iter(parts_after), OUTSIDE
    labelled = []
    for span in spans:
        if MARKER in span.name:
            current = next(parts)
        else:
            labelled.append(LabelledSpan(span, part_of_name(span.name) or current))
    return labelled


@contextmanager
def _marking(model: nn.Module, device: torch.device) -> Iterator[list[str]]:
    """While it lasts, modules start markers; what runs behind each is appended to the list."""
    marker = torch.zeros(1, device=device)
    started: list[str] = []
    parts = [OUTSIDE]  # of the modules that are running, the innermost last

    def mark(part: str) -> None:
        marker.erfinv_()
        started.append(part)

    def enter(part: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object) -> None:
            parts.append(part)
            mark(part)

        return hook

    def leave(module: nn.Module, arguments: object, output: object) -> None:
        parts.pop()
        mark(parts[-1])

    handles = []
    for name, module in model.named_modules():
        part = part_of_module(name, module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(enter(part)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield started
    finally:
        for handle in handles:
            handle.remove()


def table(labelled: Sequence[LabelledSpan], floors: dict[str, float], num_steps: int) -> list[str]:
    """Lines for people: parts by what they take above their floor, each with its kernels."""
    by_part: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in labelled:
        by_part[each.part][each.span.name].append(each.span.us / num_steps)
    total = sum(each.span.us for each in labelled) / num_steps
    times = {part: sum(map(sum, kernels.values())) for part, kernels in by_part.items()}
    lines = [f"    {'part':24} {'calls':>6} {'us':>10} {'floor':>10} {'above':>10}   a step"]
    for part, us in sorted(times.items(), key=lambda item: floors.get(item[0], 0.0) - item[1]):
        floor, kernels = floors.get(part, 0.0), by_part[part]
        calls = sum(map(len, kernels.values())) / num_steps
        lines.append(f"    {part:24} {calls:6.0f} {us:10.1f} {floor:10.1f} {us - floor:10.1f}")
        for name, each in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:6]:
            if sum(each) >= 0.002 * total:
                mean = num_steps * sum(each) / len(each)
                lines.append(f"      {short_name(name):60} {len(each) / num_steps:6.1f} x {mean:8.1f}")
    known = sum(floors.values())
    lines.append(f"    {'all':24} {len(labelled) / num_steps:6.0f} {total:10.1f} {known:10.1f} {total - known:10.1f}")
    return lines


def short_name(name: str) -> str:
    """Without what C++ templates put around a kernel's own name."""
    return re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)[:60]
