"""The MoE router: which experts a token goes to, and with what weight (noaux_tc)."""

import torch
from torch import nn

from argosy.kernels import linear_fp32_parts, route_parts
from argosy.models.deepseek.config import ModelConfig


class MoERouter(nn.Module):
    """Holds the checkpoint's ``mlp.gate``: weight [E, D] and e_score_correction_bias [E], both used in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=torch.float32), requires_grad=False)
        self.e_score_correction_bias = nn.Parameter(torch.empty(experts, dtype=torch.float32), requires_grad=False)
        self._config = config

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> logits in parts, for ``choose``: [S, T, E] float32."""
        return linear_fp32_parts(hidden_states, self.weight)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``forward`` returned -> topk_ids [T, K] int32, topk_weights [T, K] float32."""
        config = self._config
        return route_parts(
            logits,
            self.e_score_correction_bias,
            n_group=config.n_group,
            topk_group=config.topk_group,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
