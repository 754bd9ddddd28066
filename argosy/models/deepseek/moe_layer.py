"""The mixture of experts: route -> dispatch -> experts -> combine, with the shared experts under the flight.

Where the experts are is the dispatcher's business, not this file's. Invariant: works for zero tokens and for experts
that receive none.

Shape letters: T tokens, D hidden, E experts, e local experts, F expert width, M dispatched rows.
"""

import torch
from torch import nn

from argosy.distributed.ep_types import TokenDispatcher
from argosy.distributed.expert_load import LoadCounter, NoLoadCounter
from argosy.layers.forward_batch import ForwardBatch
from argosy.layers.mlp import GatedMLP
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.moe_router import MoERouter
from argosy.quantization.preparation import NormedRows
from argosy.quantization.scheme import Schemes


class MoELayer(nn.Module):
    """The checkpoint's ``mlp`` of a MoE layer. Shared experts are whole on every rank: a rank's tokens are its own."""

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: TokenDispatcher,
        schemes: Schemes,
        expert_ids: range | None = None,
        load: LoadCounter | None = None,
    ) -> None:
        """``expert_ids``: this rank's; None means all."""
        super().__init__()
        expert_ids = range(config.n_routed_experts) if expert_ids is None else expert_ids
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.gate = MoERouter(config)
        self.experts = schemes.at("experts").build_experts(expert_ids, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = GatedMLP(config.hidden_size, shared_width, schemes.at("shared_experts"))
        self.preparation = self.shared_experts.preparation
        self._is_prepared_once = dispatcher.takes_quantized and self.experts.preparation == self.preparation
        self._dispatcher = dispatcher
        self._load = load or NoLoadCounter()

    def forward(self, normed: NormedRows, batch: ForwardBatch) -> torch.Tensor:
        """T tokens -> [T, D]; routed and shared parts are added in float32. Collective over ep."""
        logits = self.gate(normed.rows)
        # NOTE(order): behind the router's product, or that would wait for what room the shared experts leave.
        shared = batch.side_lane.start(lambda: self.shared_experts(normed.prepared))
        topk_ids, topk_weights = self.gate.choose(logits)
        rows = normed.prepared if self._is_prepared_once else normed.rows
        dispatch = self._dispatcher.start_dispatch(rows, topk_ids, topk_weights, batch.exchange)
        shared.compute()
        dispatched = dispatch.wait()
        recorded = batch.side_lane.start(lambda: self._load.record(dispatched.num_tokens_per_expert))
        expert_out = self.experts(dispatched)
        recorded.wait()
        return self._dispatcher.combine_onto(expert_out, dispatched.handle, shared.wait())
