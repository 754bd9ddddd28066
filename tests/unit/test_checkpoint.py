"""Which part of each checkpoint tensor a rank holds, and the shapes of a checkpoint that is not there."""

import torch

from argosy.assets import builtin_model_directory
from argosy.distributed.layout import ParallelLayout
from argosy.models.deepseek.checkpoint import WeightShard, build_weight_mapping, checkpoint_shapes, mtp_shapes
from argosy.models.deepseek.config import load_model_config
from argosy.quantization.safetensors_headers import read_headers
from argosy.quantization.tensor_boxes import Part
from argosy.quantization.weight_plan import Destination
from tests.helpers.rank_models import build_shares

DIRECTORY = builtin_model_directory("argosy-tiny")
CONFIG = load_model_config(DIRECTORY)


def test_shapes_are_those_of_the_checkpoint() -> None:
    stored = {name: header.shape for name, header in read_headers(DIRECTORY).items()}
    assert checkpoint_shapes(CONFIG) | mtp_shapes(CONFIG) == stored
    assert all(name.startswith(f"model.layers.{CONFIG.num_hidden_layers}.") for name in mtp_shapes(CONFIG))


def test_experts_are_held_by_their_owner_alone() -> None:
    mapping = build_weight_mapping(5, 0, WeightShard(expert_ids=range(4, 6)))
    assert mapping("model.layers.1.mlp.experts.3.down_proj.weight") is None
    assert mapping("model.layers.1.mlp.experts.6.up_proj.weight") is None
    assert mapping("model.layers.1.mlp.experts.5.up_proj.weight") == Destination(
        "model.layers.1.mlp.experts.gate_up_proj", (1, Part(1, 2))
    )


def test_shared_experts_and_latents_are_whole_on_every_rank() -> None:
    mapping = build_weight_mapping(5, 0, WeightShard(tp_rank=1, tp_size=4))
    for name in (
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.self_attn.indexer.wq_b.weight",
    ):
        assert mapping(name) == Destination(name)


def test_ranks_hold_the_parts_of_one_model() -> None:
    """Put together, the shares of 4 ranks are the whole: columns by rows, rows by columns, experts by number."""
    (whole,) = build_shares(CONFIG, ParallelLayout())
    shares = build_shares(CONFIG, ParallelLayout(dp_size=2, tp_size=2))
    first_replica = shares[:2]
    for name, dim in {
        "model.embed_tokens.weight": 0,
        "lm_head.weight": 0,
        "model.layers.0.self_attn.q_b_proj.weight": 0,
        "model.layers.0.self_attn.kv_b_proj.weight": 0,
        "model.layers.0.self_attn.o_proj.weight": 1,
        "model.layers.0.mlp.down_proj.weight": 1,
    }.items():
        assert torch.equal(torch.cat([share[name] for share in first_replica], dim), whole[name]), name
        assert torch.equal(shares[0][name], shares[2][name]), name
    for name in ("gate_up_proj", "down_proj"):
        experts = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(torch.cat([share[experts] for share in shares]), whole[experts])
    # gate and up are halves, each split: rank 0 holds the first part of both.
    gate, up = whole["model.layers.0.mlp.gate_up_proj.weight"].chunk(2)
    mine = torch.cat((gate.chunk(2)[1], up.chunk(2)[1]))
    assert torch.equal(shares[1]["model.layers.0.mlp.gate_up_proj.weight"], mine)
