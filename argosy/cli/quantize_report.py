"""What ``argosy quantize`` prints at the end: errors by layer and group of modules, what was kept, and sizes.

The error is the root of sum((w - q * scale)^2) / sum(w^2): a share of the weights' own size. Pure formatting.
Invariant: every tensor of the source is in exactly one of the two tables.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from rich.table import Table

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
# By a part of the tensor's name below its layer; the first that fits.
GROUPS = (
    ("indexer", "self_attn.indexer."),
    ("attention", "self_attn."),
    ("routed experts", "mlp.experts."),
    ("shared experts", "mlp.shared_experts."),
    ("dense MLP", "mlp."),
)
_NO_LAYER = "-"


class ErrorsLike(Protocol):
    @property
    def weight_sq(self) -> float: ...

    @property
    def error_sq(self) -> float: ...


class TensorLike(Protocol):
    """One tensor, as ``argosy.quantization.convert`` reports it."""

    @property
    def name(self) -> str: ...

    @property
    def source_dtype(self) -> str: ...

    @property
    def num_source_bytes(self) -> int: ...

    @property
    def num_output_bytes(self) -> int: ...

    @property
    def errors(self) -> ErrorsLike | None: ...


def relative_error(tensors: Iterable[TensorLike]) -> float | None:
    """Of all of them together; None without weights, or where all are zero."""
    errors = [tensor.errors for tensor in tensors if tensor.errors is not None]
    weight_sq = math.fsum(item.weight_sq for item in errors)
    return math.sqrt(math.fsum(item.error_sq for item in errors) / weight_sq) if weight_sq > 0 else None


def build_error_table(tensors: Sequence[TensorLike]) -> Table:
    """A row for every layer, one for all."""
    quantized = [tensor for tensor in tensors if tensor.errors is not None]
    table = Table(title="Quantised: relative RMS error of weights, %")
    for heading in ("layer", *(name for name, _ in GROUPS), "worst tensor"):
        table.add_column(heading, justify="left" if heading == "worst tensor" else "right", overflow="fold")
    by_layer: dict[str, list[TensorLike]] = {}
    for tensor in quantized:
        by_layer.setdefault(_split(tensor.name)[0], []).append(tensor)
    for layer in sorted(by_layer, key=lambda text: (not text.isdigit(), text.zfill(6))):
        table.add_row(layer, *_error_cells(by_layer[layer]))
    table.add_section()
    table.add_row("all", *_error_cells(quantized))
    return table


def build_kept_table(tensors: Sequence[TensorLike]) -> Table:
    """A row for every kind of tensor that was not quantised; layer and expert numbers are folded into ``*``."""
    table = Table(title="Kept")
    for heading in ("tensors", "count", "stored as", "MiB"):
        table.add_column(heading, justify="left" if heading == "tensors" else "right")
    kinds: dict[tuple[str, str], list[TensorLike]] = {}
    for tensor in tensors:
        if tensor.errors is None:
            stored = "BF16, was F8_E4M3" if tensor.source_dtype == "F8_E4M3" else tensor.source_dtype
            kinds.setdefault((re.sub(r"\.\d+\.", ".*.", tensor.name), stored), []).append(tensor)
    for (name, stored), members in sorted(kinds.items()):
        table.add_row(name, f"{len(members):,}", stored, _mebibytes(tensor.num_output_bytes for tensor in members))
    return table


def describe_sizes(tensors: Sequence[TensorLike], destination: Path) -> str:
    num_quantized = sum(tensor.errors is not None for tensor in tensors)
    return (
        f"{destination}: {num_quantized:,} of {len(tensors):,} tensors quantised, "
        f"{_mebibytes(tensor.num_source_bytes for tensor in tensors)} -> "
        f"{_mebibytes(tensor.num_output_bytes for tensor in tensors)} MiB"
    )


def _error_cells(tensors: Sequence[TensorLike]) -> list[str]:
    cells = [
        _percent(relative_error(tensor for tensor in tensors if _group_of(tensor.name) == group)) for group, _ in GROUPS
    ]
    worst = max(tensors, key=lambda tensor: (relative_error([tensor]) or 0.0, tensor.name), default=None)
    if worst is None:
        return [*cells, ""]
    return [*cells, f"{_percent(relative_error([worst]))}  {_split(worst.name)[1].removesuffix('.weight')}"]


def _split(name: str) -> tuple[str, str]:
    """The layer's number, and the name below it."""
    match = _LAYER.fullmatch(name)
    return (match[1], match[2]) if match else (_NO_LAYER, name)


def _group_of(name: str) -> str:
    below = _split(name)[1]
    return next((group for group, part in GROUPS if part in below), "")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _mebibytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 2**20:,.1f}"
