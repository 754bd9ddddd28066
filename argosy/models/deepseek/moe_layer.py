"""The mixture of experts: route -> dispatch -> experts -> combine, with the shared experts under the flight.

Where the experts are is the dispatcher's business, not this file's. Invariant: works for zero tokens and for experts
that receive none.

Shape letters: T tokens, D hidden, E experts, e local experts, F expert width, M dispatched rows.
"""

import torch
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens, TokenDispatcher
from argosy.distributed.expert_load import LoadCounter, NoLoadCounter
from argosy.kernels import grouped_mlp, grouped_mlp_masked
from argosy.layers.forward_batch import ForwardBatch
from argosy.layers.mlp import GatedMLP
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.moe_router import MoERouter


class RoutedExperts(nn.Module):
    """The weights of this rank's experts, stacked."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = _empty_matrices(num_local_experts, 2 * expert_width, hidden_size, dtype)
        self.down_proj = _empty_matrices(num_local_experts, hidden_size, expert_width, dtype)

    def forward(self, dispatched: DispatchedTokens) -> torch.Tensor:
        """-> the experts' output in the form of ``dispatched.hidden_states``: [M, D] or [e, capacity, D]."""
        compute = grouped_mlp_masked if dispatched.is_padded else grouped_mlp
        return compute(dispatched.hidden_states, self.gate_up_proj, self.down_proj, dispatched.num_tokens_per_expert)


def _empty_matrices(num_experts: int, out_size: int, in_size: int, dtype: torch.dtype) -> nn.Parameter:
    """[num_experts, out_size, in_size]. On a CPU its memory is ordered [.., in, out]: batched products of few rows read
    that a fifth faster (``docs/log.md``, 2026-11-22)."""
    if torch.get_default_device().type == "cpu":
        weight = torch.empty(num_experts, in_size, out_size, dtype=dtype).transpose(1, 2)
    else:
        weight = torch.empty(num_experts, out_size, in_size, dtype=dtype)
    return nn.Parameter(weight, requires_grad=False)


class MoELayer(nn.Module):
    """The checkpoint's ``mlp`` of a MoE layer. Shared experts are whole on every rank: a rank's tokens are its own."""

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: TokenDispatcher,
        dtype: torch.dtype,
        num_local_experts: int | None = None,
        load: LoadCounter | None = None,
    ) -> None:
        """``num_local_experts``: None means all."""
        super().__init__()
        if num_local_experts is None:
            num_local_experts = config.n_routed_experts
        self.gate = MoERouter(config)
        self.experts = RoutedExperts(num_local_experts, config.hidden_size, config.moe_intermediate_size, dtype)
        self.shared_experts = GatedMLP(
            config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, dtype
        )
        self._dispatcher = dispatcher
        self._load = load or NoLoadCounter()

    def forward(self, hidden_states: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> [T, D]; routed and shared parts are added in float32. Collective over ep."""
        topk_ids, topk_weights = self.gate(hidden_states)
        dispatch = self._dispatcher.start_dispatch(hidden_states, topk_ids, topk_weights, batch.exchange)
        shared_out = self.shared_experts(hidden_states)
        dispatched = dispatch.wait()
        self._load.record(dispatched.num_tokens_per_expert)
        combine = self._dispatcher.start_combine(self.experts(dispatched), dispatched.handle)
        return (combine.wait() + shared_out).to(hidden_states.dtype)
