"""Which implementation of an operation a device gets, where its caller lives too low in the tree to import kernels.

Most operations choose by their tensor's device; ``distributed`` does not know this package and is handed its kernels.
Invariant: what is returned equals ``reference`` within float32's rounding.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar, cast

import torch

from argosy.kernels.compilations import CompilationCounter, LateCompilations, NoCompilations, Report
from argosy.kernels.cpu_choice import load_loops

if TYPE_CHECKING:
    from argosy.kernels.triton.one_sided import TritonOneSidedOps
    from argosy.kernels.triton.row_ops import TritonRowOps

SumRows = TypeVar("SumRows", bound=Callable[..., torch.Tensor])
SpreadWeights = TypeVar("SpreadWeights", bound=Callable[..., tuple[torch.Tensor, torch.Tensor]])


def select_sum_rows(device_type: str, reference: SumRows) -> SumRows:
    """For ``build_dispatcher(..., sum_rows=...)``: the fused kernel on CUDA, ``reference`` elsewhere."""
    if device_type != "cuda":
        return reference
    # Triton is installed with CUDA's torch only.
    from argosy.kernels.triton.sum_rows import sum_rows

    return cast(SumRows, sum_rows)


def select_row_ops(device_type: str) -> "TritonRowOps | None":
    """For ``build_dispatcher(..., row_ops=...)``: fused kernels on CUDA, None for plain torch elsewhere."""
    if device_type != "cuda":
        return None
    from argosy.kernels.triton.row_ops import TritonRowOps

    return TritonRowOps()


def select_one_sided_ops(device_type: str) -> "TritonOneSidedOps":
    """For ``SymmetricTransport``: kernels that reach into other ranks' memory, which only CUDA's can.

    Raises:
        ValueError: there are none for such devices.
    """
    if device_type != "cuda":
        raise ValueError(
            f"ll_transport symmetric needs NVIDIA cards that reach each other's memory, and ranks are on"
            f" {device_type!r}; set --ll-transport collective"
        )
    from argosy.kernels.triton.one_sided import TritonOneSidedOps

    return TritonOneSidedOps()


def select_max_whole_tokens(device_type: str, dtype: torch.dtype) -> int:
    """For ``build_dispatcher(..., max_whole_tokens=...)``, where experts are plain: up to how many tokens a CPU is
    faster with all experts in one product (measured with 32 experts of 64, ``docs/log.md``, 2026-11-22)."""
    return 48 if device_type == "cpu" and dtype == torch.float32 else 0


def select_spread_weights(device_type: str, reference: SpreadWeights) -> SpreadWeights:
    """For ``build_dispatcher(..., spread_weights=...)``: a compiled loop on a CPU that has numba."""
    loops = load_loops() if device_type == "cpu" else None
    return reference if loops is None else cast(SpreadWeights, loops.spread_weights)


def select_joined_linears(device_type: str, *, is_quantized: bool) -> bool:
    """For ``group_linears(..., is_joined=...)``: quantised ones on CUDA, where three narrow products leave most of the
    card idle, and plain ones on a CPU, where each is mostly the cost of a call."""
    return device_type == ("cuda" if is_quantized else "cpu")


def select_expert_layout(device_type: str) -> Literal["padded", "sorted"]:
    """For ``build_dispatcher(..., low_latency_layout=...)``: the form whose product skips what is nobody's.

    ``grouped_mlp_masked`` stops at the busiest expert's count only on a CPU; CUDA's grouped product reads the counts of
    sorted rows on the card.
    """
    return "sorted" if device_type == "cuda" else "padded"


def select_compilation_counter(device_type: str, report: Report) -> CompilationCounter:
    """Counts what Triton compiles on CUDA; elsewhere nothing is compiled."""
    if device_type != "cuda":
        return NoCompilations()
    from argosy.kernels.triton.compilation_hook import watch_compilations

    counter = LateCompilations(report)
    watch_compilations(counter)
    return counter
