"""Writes a trained model as a DeepSeek-V3.2 checkpoint folder, and reads one back.

bf16 except norms, the router's correction bias and the indexer's k_norm (fp32), as in the real checkpoint.
Invariant: reading what was written gives the model rounded to those dtypes, exactly.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.train_tiny.config import TinyConfig
from tools.train_tiny.model import TinyModel

NUM_SHARDS = 3
_FP32_PARTS = ("norm", "e_score_correction_bias")


def export_checkpoint(model: TinyModel, folder: Path) -> None:
    """Writes config.json, generation_config.json, the shards and their index. Leaves other files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    _write_json(folder / "config.json", config.to_json_dict())
    _write_json(folder / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
        "do_sample": True, "temperature": 1.0, "top_p": 0.95,
    })  # fmt: skip
    tensors = checkpoint_tensors(model)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_split_names(tensors), start=1):
        file_name = f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, str(folder / file_name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def checkpoint_tensors(model: TinyModel) -> dict[str, Tensor]:
    """Checkpoint name -> tensor, in the order of the layers."""
    config, state = model.config, model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".experts.gate_up_proj" in name:
            gate, up = value.chunk(2, dim=1)
            tensors |= _expert_tensors(name, {"gate_proj": gate, "up_proj": up})
        elif ".experts.down_proj" in name:
            tensors |= _expert_tensors(name, {"down_proj": value})
        else:
            tensors[name] = value
    mtp = f"model.layers.{config.num_hidden_layers}."
    tensors[mtp + "embed_tokens.weight"] = state["model.embed_tokens.weight"]
    tensors[mtp + "shared_head.head.weight"] = state["lm_head.weight"]
    return {name: _rounded(name, value) for name, value in tensors.items()}


def load_exported(folder: Path, config: TinyConfig) -> TinyModel:
    """The model of a checkpoint folder, in fp32 with bf16-rounded weights."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name).float() for name in shard.keys()}  # noqa: SIM118
    model = TinyModel(config)
    state = {}
    for name in model.state_dict():
        if ".experts." in name:
            state[name] = _stack_experts(tensors, name, config.n_routed_experts)
        else:
            state[name] = tensors[name]
    model.load_state_dict(state)
    return model.eval()


def _expert_tensors(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = name[: name.rindex(".")]
    return {f"{prefix}.{e}.{part}.weight": value[e] for part, value in parts.items() for e in range(value.shape[0])}


def _stack_experts(tensors: dict[str, Tensor], name: str, num_experts: int) -> Tensor:
    prefix, kind = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    rows = [torch.cat([tensors[f"{prefix}.{e}.{p}.weight"] for p in parts]) for e in range(num_experts)]
    return torch.stack(rows)


def _rounded(name: str, value: Tensor) -> Tensor:
    dtype = torch.float32 if any(part in name for part in _FP32_PARTS) else torch.bfloat16
    return value.detach().to("cpu", dtype).clone().contiguous()


def _split_names(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names in order, cut into shards of nearly equal bytes."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    limit, shards, used = sum(sizes.values()) / NUM_SHARDS, [[] for _ in range(NUM_SHARDS)], 0.0
    for name, size in sizes.items():
        shards[min(int((used + size / 2) / limit), NUM_SHARDS - 1)].append(name)
        used += size
    return shards


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
