"""What ``dispatch.py`` prints: one row for each size and mode, and at the end those that ``--ep-mode auto`` takes.

Nothing is measured here. Invariant: every ratio is over a plain exchange that was timed in the same row.
"""

import argparse
from dataclasses import dataclass

import torch

from argosy.cli.code_version import read_commit
from argosy.platforms import Platform


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Median microseconds of the slowest rank. Bytes: rank 0's whole message, its part for itself included."""

    way: str  # an exchange mode, or "symmetric": low_latency through shared memory
    num_tokens: int
    is_graph: bool
    is_auto: bool  # the mode that --ep-mode auto takes for as many tokens
    dispatch_bytes: int
    combine_bytes: int
    plain_dispatch_us: float  # torch's all_to_all_single of dispatch_bytes
    exchange_us: float
    dispatch_us: float  # exchange, and arranging for the experts
    plain_combine_us: float
    return_us: float
    combine_us: float  # summing the experts' rows, and return
    shared_us: float
    overlapped_us: float  # start dispatch, shared experts, wait

    def exchange_ratio(self) -> float:
        return self.exchange_us / self.plain_dispatch_us

    def return_ratio(self) -> float:
        return self.return_us / self.plain_combine_us

    def hidden_share(self) -> float:
        """Of the shorter of dispatch and shared experts, what running both together saves."""
        saved_us = self.dispatch_us + self.shared_us - self.overlapped_us
        return saved_us / min(self.dispatch_us, self.shared_us)


def print_head(arguments: argparse.Namespace, platform: Platform, num_warmup: int) -> None:
    print(
        f"Expert parallel dispatch and combine, {arguments.world} x {platform.device_name()}, {platform.comm_backend}"
    )
    print(
        f"torch {torch.__version__}, commit {read_commit()}, D {arguments.hidden_size}, E {arguments.num_experts},"
        f" K {arguments.num_experts_per_tok}, payload {arguments.payload}, {platform.default_dtype(torch.bfloat16)}"
    )
    print(
        f"{num_warmup} calls of warm-up, median of {arguments.runs} runs of {arguments.calls} calls, us; slowest rank\n"
    )
    print(
        "  tokens mode              graph auto |  plain  exchange ratio   GB/s  dispatch |"
        "  plain    return ratio   GB/s   combine | shared  both  hidden"
    )


def print_cost(cost: Cost) -> None:
    print(
        f"  {cost.num_tokens:6d} {cost.way:17s} {_yes_or_no(cost.is_graph):5s} {_yes_or_no(cost.is_auto):4s} |"
        f" {cost.plain_dispatch_us:6.0f} {cost.exchange_us:9.0f} {cost.exchange_ratio():5.2f}"
        f" {cost.dispatch_bytes / cost.exchange_us / 1e3:6.1f} {cost.dispatch_us:9.0f} |"
        f" {cost.plain_combine_us:6.0f} {cost.return_us:9.0f} {cost.return_ratio():5.2f}"
        f" {cost.combine_bytes / cost.return_us / 1e3:6.1f} {cost.combine_us:9.0f} |"
        f" {cost.shared_us:6.0f} {cost.overlapped_us:5.0f} {cost.hidden_share():6.0%}",
        flush=True,
    )


def print_auto(costs: list[Cost]) -> None:
    print("\nWhat auto takes, over a plain all_to_all_single of the same bytes\n")
    print("  tokens mode              graph | exchange, us ratio | return, us ratio | both ratio")
    for cost in (each for each in costs if each.is_auto):
        both_us, plain_us = cost.exchange_us + cost.return_us, cost.plain_dispatch_us + cost.plain_combine_us
        print(
            f"  {cost.num_tokens:6d} {cost.way:17s} {_yes_or_no(cost.is_graph):5s} | {cost.exchange_us:12.0f}"
            f" {cost.exchange_ratio():5.2f} | {cost.return_us:10.0f} {cost.return_ratio():5.2f} |"
            f" {both_us / plain_us:10.2f}"
        )


def _yes_or_no(flag: bool) -> str:
    return "yes" if flag else "no"
