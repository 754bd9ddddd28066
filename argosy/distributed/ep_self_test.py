"""One MoE exchange whose result is known beforehand, in every mode: the last part of the start's self-test.

Experts here multiply by a number of their own; real ones are the model's. Invariant: every rank takes part in every
mode before it says what it found.

Shape letters: T tokens, D hidden, M sorted rows, e local experts.
"""

from collections.abc import Callable

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_types import EXCHANGE_MODES, DispatchedTokens, ExchangePlan, TokenDispatcher

BuildDispatcher = Callable[[Communicator, int], TokenDispatcher]
_HIDDEN_SIZE = 32
_EXPERTS_PER_RANK = 2
_MAX_TOKENS = 3


def check_experts(ep: Communicator, device: torch.device, build: BuildDispatcher = build_dispatcher) -> None:
    """Collective over ep. NOTE(sync): reads results on the host.

    Raises:
        RuntimeError: naming the modes in which a token came home with another sum than its experts make.
    """
    if ep.size == 1:
        return
    ep = ep.named("self-test")
    num_experts = _EXPERTS_PER_RANK * ep.size
    with torch.device(device):
        dispatcher = build(ep, num_experts)
        # Some ranks bring fewer tokens, and some none. Small integers: every sum is exact.
        tokens = torch.arange(1, 1 + (ep.rank + 1) % (_MAX_TOKENS + 1)) + ep.rank
        near, far = tokens % num_experts, (tokens + ep.size) % num_experts
        x = tokens.to(torch.float32).unsqueeze(1).expand(-1, _HIDDEN_SIZE).contiguous()  # [T, D]
        topk_ids = torch.stack((near, far), dim=1).to(torch.int32)
        topk_weights = torch.tensor([1.0, 0.5]).expand(tokens.shape[0], -1).contiguous()
    expected = x * ((near + 1) + 0.5 * (far + 1)).unsqueeze(1)
    wrong = []
    for mode in EXCHANGE_MODES:
        dispatched = dispatcher.start_dispatch(x, topk_ids, topk_weights, ExchangePlan(mode, _MAX_TOKENS)).wait()
        out = dispatcher.start_combine(_multiply(dispatched, ep.rank), dispatched.handle).wait()
        if not torch.equal(out, expected):
            wrong.append(mode)
    if wrong:
        raise RuntimeError(
            f"self-test on rank {ep.ranks[ep.rank]}: tokens came back from the experts with a wrong sum in mode "
            f"{', '.join(wrong)}; check the network and the devices"
        )


def _multiply(dispatched: DispatchedTokens, ep_rank: int) -> torch.Tensor:
    """Expert number i multiplies by i + 1."""
    rows = dispatched.hidden_states
    counts = dispatched.num_tokens_per_expert.to(torch.int64)
    factors = torch.arange(1, counts.shape[0] + 1, device=rows.device) + ep_rank * _EXPERTS_PER_RANK  # [e]
    if dispatched.is_padded:
        return rows * factors.view(-1, 1, 1)
    by_row = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)  # [M]
    owned = factors.repeat_interleave(counts)
    by_row[: owned.shape[0]] = owned.to(rows.dtype)
    return rows * by_row.unsqueeze(1)
