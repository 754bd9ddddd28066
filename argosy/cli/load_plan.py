"""``--load-plan``: prints what every rank would read of the checkpoint and hold in memory, and loads nothing.

Every command with engine flags has it; the command itself does not run. What is printed comes from
``engine/load_plan.py``. Invariant: one table for each set of ranks with equal amounts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from argosy.cli.invocation import EXIT_OK, Invocation

if TYPE_CHECKING:
    from argosy.engine.load_plan import LoadPlan
    from argosy.models.deepseek.load_plan import RankLoadPlan

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_COLUMNS = "  {:<32}{:>14}{:>14}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlanOptions:
    """Look before loading."""

    load_plan: bool = False  # print what each rank would read and hold, from the checkpoint's headers alone, and stop


def run_load_plan(invocation: Invocation) -> int:
    # Imported here: it brings torch, and no other command line answer should wait for that.
    from argosy.engine.load_plan import make_load_plan

    print("\n".join(show_load_plan(make_load_plan(invocation.engine_config))), file=invocation.terminal.stdout)
    return EXIT_OK


def show_load_plan(plan: "LoadPlan") -> list[str]:
    config, layout = plan.config, plan.layout
    is_dummy = config.load_format == "dummy"
    lines = [
        f"load plan of {plan.directory}",
        f"  dp {layout.dp_size} x tp {layout.tp_size} = {layout.world_size} ranks, ep {layout.num_ep_ranks}; linears "
        f"compute {'plain' if plan.quantization.kind == 'none' else plan.quantization.kind}; dtype {config.dtype}",
    ]
    if is_dummy:
        lines.append("  load_format dummy: weights are made where they are needed, and nothing is read")
    else:
        lines.append(
            f"  checkpoint: {_show_bytes(plan.tensor_bytes)} of tensors in {plan.num_files} files; every rank also "
            f"reads {plan.header_bytes:,} bytes of headers"
        )
    for rank_plan in plan.ranks:
        lines += ["", *_show_ranks(rank_plan, plan.num_mtp_layers, is_dummy=is_dummy)]
    if not is_dummy:
        total_bytes = sum(each.read_bytes * len(each.ranks) for each in plan.ranks)
        lines += ["", f"all ranks together read {_show_bytes(total_bytes)}"]
    return lines


def _show_ranks(plan: "RankLoadPlan", num_mtp_layers: int, *, is_dummy: bool) -> list[str]:
    unit, unit_bytes = _unit_of(plan.memory_bytes)

    def row(name: str, read_bytes: int, memory_bytes: int) -> str:
        read = "-" if is_dummy else f"{read_bytes / unit_bytes:,.2f}"
        return _COLUMNS.format(name, read, f"{memory_bytes / unit_bytes:,.2f}")

    who = f"{'rank' if len(plan.ranks) == 1 else 'each of ranks'} {_show_numbers(plan.ranks)}"
    lines = [_COLUMNS.format(f"{who}, {unit}", "read", "in memory")]
    lines += [row(each.part, each.read_bytes, each.memory_bytes) for each in plan.parts if each.memory_bytes]
    lines.append(row("total", plan.read_bytes, plan.memory_bytes))
    if num_mtp_layers and not is_dummy:
        layers = "MTP layer" if num_mtp_layers == 1 else f"{num_mtp_layers} MTP layers"
        lines.append(_COLUMNS.format(f"({layers}, not loaded yet)", f"{plan.mtp_bytes / unit_bytes:,.2f}", "-"))
    return lines


def _show_numbers(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _unit_of(num_bytes: int) -> tuple[str, int]:
    """The largest in which it is at least 1, with its size."""
    return next((unit for unit in _UNITS if num_bytes >= unit[1]), _UNITS[-1])


def _show_bytes(num_bytes: int) -> str:
    unit, unit_bytes = _unit_of(num_bytes)
    return f"{num_bytes / unit_bytes:,.2f} {unit}"
