"""The mixture of experts: route -> dispatch -> experts -> combine, with the shared experts under the flight.

Where the experts are is the dispatcher's business, not this file's. Invariant: works for zero tokens and for experts
that receive none.

Shape letters: T tokens, D hidden, E experts, e local experts, F expert width, M dispatched rows.
"""

import torch
from torch import nn

from argosy.distributed.ep_dispatch import TokenDispatcher
from argosy.kernels import grouped_mlp
from argosy.layers.mlp import GatedMLP
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.moe_router import MoERouter


class RoutedExperts(nn.Module):
    """The weights of this rank's experts, stacked."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_local_experts, 2 * expert_width, hidden_size, dtype=dtype), requires_grad=False
        )
        self.down_proj = nn.Parameter(
            torch.empty(num_local_experts, hidden_size, expert_width, dtype=dtype), requires_grad=False
        )

    def forward(self, x: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """``x: [M, D]`` sorted by expert, counts [e] int32 -> [M, D]."""
        return grouped_mlp(x, self.gate_up_proj, self.down_proj, num_tokens_per_expert)


class MoELayer(nn.Module):
    """The checkpoint's ``mlp`` of a MoE layer."""

    def __init__(self, config: ModelConfig, dispatcher: TokenDispatcher, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = MoERouter(config)
        self.experts = RoutedExperts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, dtype)
        self.shared_experts = GatedMLP(
            config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, dtype
        )
        self._dispatcher = dispatcher

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> [T, D]; routed and shared parts are added in float32."""
        topk_ids, topk_weights = self.gate(hidden_states)
        dispatch = self._dispatcher.start_dispatch(hidden_states, topk_ids, topk_weights)
        shared_out = self.shared_experts(hidden_states)
        dispatched = dispatch.wait()
        expert_out = self.experts(dispatched.hidden_states, dispatched.num_tokens_per_expert)
        routed_out = self._dispatcher.start_combine(expert_out, dispatched.handle).wait()
        return (routed_out + shared_out).to(hidden_states.dtype)
