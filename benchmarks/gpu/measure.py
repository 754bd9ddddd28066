"""One case: check, time, and set beside the roofline and the alternatives, all in one run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import triton

# What a Hopper card with HBM3e reaches elsewhere: bytes/s of a copy; operations/s of the best published kernels.
PEAK_BYTES_S = 4.3e12
PEAK_OPS_S = {"bf16": 757e12, "int8": 1.366e15, "fp8": 1.353e15}
WARM_UP_MS, REPEAT_MS = 20, 80


@dataclass(frozen=True, kw_only=True)
class Case:
    """``run`` is what is timed, on inputs made before. ``check`` compares it with the specification and raises."""

    name: str
    rows: int
    run: Callable[[], object]
    check: Callable[[], None]
    num_ops: float  # that must be done
    num_bytes: float  # the fewest that must move: each input read once, each output written once
    unit: Literal["bf16", "int8", "fp8"] = "bf16"
    alternatives: Mapping[str, Callable[[], object]] = field(default_factory=dict)  # others that give the same


@dataclass(frozen=True)
class Line:
    """One measured case; times in microseconds."""

    name: str
    rows: int
    us: float
    p10_us: float
    p90_us: float
    tera_ops_s: float
    giga_bytes_s: float
    roofline_share: float
    alternatives_us: dict[str, float]


HEADER = f"{'kernel':38} {'rows':>6} {'us':>9} {'p10':>9} {'p90':>9} {'TOP/s':>6} {'GB/s':>6} {'roof':>5}  others, us"


def measure(case: Case) -> Line:
    """Raises whatever ``check`` raises."""
    case.check()
    p10, median, p90 = (ms * 1e3 for ms in _time(case.run))
    others = {name: _time(run)[1] * 1e3 for name, run in case.alternatives.items()}
    floor_us = max(case.num_ops / PEAK_OPS_S[case.unit], case.num_bytes / PEAK_BYTES_S) * 1e6
    return Line(
        case.name,
        case.rows,
        median,
        p10,
        p90,
        case.num_ops / median / 1e6,
        case.num_bytes / median / 1e3,
        floor_us / median,
        others,
    )


def describe(line: Line) -> str:
    others = ", ".join(f"{name} {us:.1f} ({us / line.us:.2f}x)" for name, us in line.alternatives_us.items())
    return (
        f"{line.name:38} {line.rows:6d} {line.us:9.1f} {line.p10_us:9.1f} {line.p90_us:9.1f} {line.tera_ops_s:6.0f} "
        f"{line.giga_bytes_s:6.0f} {line.roofline_share:5.0%}  {others}"
    )


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN if either holds one."""
    expected = expected.double()
    return ((out.double() - expected).norm() / expected.norm()).item()


def _time(run: Callable[[], object]) -> tuple[float, float, float]:
    """p10, median, p90 in ms, with a cold L2 before each."""
    p10, median, p90 = triton.testing.do_bench(run, warmup=WARM_UP_MS, rep=REPEAT_MS, quantiles=[0.1, 0.5, 0.9])
    return p10, median, p90
