"""Sixteen ranks load the built-in model in W8A8, each its slice, and nothing is read that nobody needs."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from argosy.assets import builtin_model_directory
from argosy.cli.main import main
from argosy.config import EngineConfig
from argosy.distributed.layout import ParallelLayout
from argosy.engine.build_rank import build_model
from argosy.engine.weight_format import choose_quantization
from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.models.deepseek.config import load_model_config
from argosy.models.deepseek.load_plan import plan_load
from argosy.models.deepseek.model import weight_shard
from argosy.platforms import select_platform
from argosy.quantization.placement import spec_of
from argosy.quantization.safetensors_headers import read_headers
from argosy.quantization.weight_loader import load_weights
from tests.helpers.fake_language_model import fake_terminal
from tests.helpers.rank_pool import PoolContext, RankPool

LAYOUT = ParallelLayout(dp_size=2, tp_size=8)
ATTENTION, EXPERTS = "model.layers.2.self_attn", "model.layers.2.mlp.experts"
SHOWN = tuple(
    f"{name}{suffix}"
    for name in (f"{ATTENTION}.o_proj.weight", f"{ATTENTION}.q_b_proj.weight", f"{EXPERTS}.down_proj")
    for suffix in ("", "_scale")
)
SPLIT_BY_TP = (
    "embed_tokens",
    "lm_head",
    "q_b_proj",
    "kv_b_proj",
    ".mlp.gate_proj.",
    ".mlp.up_proj.",
    ".mlp.down_proj.",
)


def load_share(context: PoolContext, directory: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The bytes that this rank has read, after checking that the plan says so, and some of what it holds now."""
    config = EngineConfig(model=str(directory), dtype="float32", dp_size=LAYOUT.dp_size, tp_size=LAYOUT.tp_size)
    model_config, mesh = load_model_config(directory), context.mesh(LAYOUT)
    quantization = choose_quantization(config, directory, select_platform("cpu"))
    model = build_model(config, model_config, quantization, mesh, torch.device("cpu"))
    shard = weight_shard(model_config, mesh)
    mapping = build_weight_mapping(model_config.num_hidden_layers, model_config.num_nextn_predict_layers, shard)
    stats = load_weights(model, directory, mapping=mapping)
    state = model.state_dict()
    parameters = {name: spec_of(parameter) for name, parameter in state.items()}
    plans = plan_load(read_headers(directory), model_config, LAYOUT, parameters, quantization.block_size)
    assert [plan.read_bytes for plan in plans if context.rank in plan.ranks] == [stats.read_bytes]
    return stats.read_bytes, {name: state[name].clone() for name in SHOWN}


@pytest.fixture(scope="module")
def w8a8_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("w8a8") / "argosy-tiny"
    source = str(builtin_model_directory("argosy-tiny"))
    assert main(["quantize", source, str(directory), "--scheme", "w8a8"], terminal=fake_terminal()) == 0
    return directory


def test_sixteen_ranks_load_their_slices_of_the_int8_model(rank_pool: RankPool, w8a8_directory: Path) -> None:
    loads = rank_pool.run(load_share, w8a8_directory, world=LAYOUT.world_size)
    assert sum(read_bytes for read_bytes, _ in loads) == expected_bytes_of_all_ranks(w8a8_directory)
    shares = [share for _, share in loads]
    o_proj, o_scale = read_tensor(w8a8_directory, SHOWN[0]), read_tensor(w8a8_directory, SHOWN[1])
    assert o_proj.dtype == torch.int8
    for replica in (shares[:8], shares[8:]):
        assert torch.equal(torch.cat([share[SHOWN[0]] for share in replica], 1), o_proj)
        assert all(torch.equal(share[SHOWN[1]], o_scale) for share in replica)  # of whole rows: every rank needs it
        for name in SHOWN[2:4]:
            assert torch.equal(torch.cat([share[name] for share in replica]), read_tensor(w8a8_directory, name))
    for name, suffix in ((SHOWN[4], ""), (SHOWN[5], "_scale")):
        experts = [read_tensor(w8a8_directory, f"{EXPERTS}.{i}.down_proj.weight{suffix}") for i in range(32)]
        assert torch.equal(torch.cat([share[name] for share in shares]), torch.stack(experts))


def expected_bytes_of_all_ranks(directory: Path) -> int:
    """From names alone: experts once, what tp splits once a replica, and everything else, with the scales of rows that
    tp cuts through, once a rank."""
    num_layers = load_model_config(directory).num_hidden_layers
    num_bytes = 0
    for name, header in read_headers(directory).items():
        if name.startswith(f"model.layers.{num_layers}."):
            continue  # MTP's
        is_scale = name.endswith("_scale")
        if ".experts." in name:
            num_readers = 1
        elif ".shared_experts." in name or (is_scale and (".o_proj." in name or ".mlp.down_proj." in name)):
            num_readers = LAYOUT.world_size
        elif ".o_proj." in name or any(text in name for text in SPLIT_BY_TP):
            num_readers = LAYOUT.dp_size
        else:
            num_readers = LAYOUT.world_size
        num_bytes += num_readers * header.num_bytes
    return num_bytes


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    with safe_open(read_headers(directory)[name].file, framework="pt") as shard:
        tensor: torch.Tensor = shard.get_tensor(name)
        return tensor
