"""Which experts tokens go to when weights are random: drawn, as trained routers spread tokens.

Routers compute all the same, and give the weights; only their choice is replaced. Invariant: token i of every step goes
to the same experts of a layer, so that a run repeats, and both sides of a comparison get the same loads.

Shape letters: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from argosy.models.deepseek.config import ModelConfig

SPREAD = 0.33  # of an expert's preference: the busiest expert gets about twice the mean at 4,096 tokens


class SpreadRouter(nn.Module):
    """Runs the router, and hands out the drawn choice with the weights."""

    def __init__(self, router: nn.Module, topk_ids: torch.Tensor) -> None:
        super().__init__()
        self._router, self._topk_ids = router, topk_ids

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._router(hidden_states)
        return logits

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, topk_weights = self._router.choose(logits)
        return self._topk_ids[: topk_weights.shape[0]], topk_weights


def spread_routing(model: nn.Module, topk_ids_by_layer: Sequence[torch.Tensor]) -> None:
    """``model.model.layers`` get the choices, [T, K] int32 each, MoE layer by MoE layer."""
    choices = iter(topk_ids_by_layer)
    for layer in model.model.layers:  # type: ignore[union-attr]
        if "gate" in dict(layer.mlp.named_children()):
            layer.mlp.gate = SpreadRouter(layer.mlp.gate, next(choices))


def draw_by_layer(
    draw: Callable[[ModelConfig, int, int], torch.Tensor], config: ModelConfig, num_tokens: int, device: torch.device
) -> list[torch.Tensor]:
    """``draw``'s choices for every MoE layer, its number the seed."""
    num_layers = config.num_hidden_layers - config.first_k_dense_replace
    return [draw(config, num_tokens, layer).to(device) for layer in range(num_layers)]


def draw_trained(config: ModelConfig, num_tokens: int, seed: int) -> torch.Tensor:
    """[T, K] int32: experts differ in how often they are chosen."""
    generator = torch.Generator().manual_seed(seed)
    preference = torch.randn(config.n_routed_experts, generator=generator) * SPREAD
    noise = _gumbel(num_tokens, config.n_routed_experts, generator)
    return (preference + noise).topk(config.num_experts_per_tok, dim=1)[1].to(torch.int32)


def draw_even(config: ModelConfig, num_tokens: int, seed: int) -> torch.Tensor:
    """[T, K] int32: ``topk_group`` of the groups, then of their experts, all choices alike."""
    generator = torch.Generator().manual_seed(seed)
    groups = _gumbel(num_tokens, config.n_group, generator).topk(config.topk_group, dim=1)[1]
    is_closed = torch.ones(num_tokens, config.n_group, dtype=torch.bool).scatter_(1, groups, False)
    noise = _gumbel(num_tokens, config.n_routed_experts, generator)
    noise.view(num_tokens, config.n_group, -1).masked_fill_(is_closed.unsqueeze(2), -torch.inf)
    return noise.topk(config.num_experts_per_tok, dim=1)[1].to(torch.int32)


def imbalance(topk_ids: torch.Tensor, num_experts: int, num_tokens: int) -> float:
    """The busiest expert's tokens over the mean, of the first ``num_tokens``."""
    counts = torch.bincount(topk_ids[:num_tokens].flatten().long().cpu(), minlength=num_experts).double()
    return (counts.max() / counts.mean()).item()


def experts_hit(topk_ids_by_layer: Sequence[torch.Tensor], num_tokens: int) -> float:
    """Experts that the first ``num_tokens`` visit, mean over layers."""
    hit = [topk_ids[:num_tokens].unique().numel() for topk_ids in topk_ids_by_layer]
    return sum(hit) / len(hit) if hit else 0.0


def _gumbel(num_rows: int, num_columns: int, generator: torch.Generator) -> torch.Tensor:
    return -torch.log(-torch.log(torch.rand(num_rows, num_columns, generator=generator)))
