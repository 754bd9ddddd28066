"""What every rank of a layout would read of a checkpoint and hold in memory, told from headers alone.

It plans with the loader's own planner (``weight_plan.py``), so the two cannot disagree; it reads no tensor's data and
imports no torch. Invariant: the bytes that it names are those that the loader's reader counts.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from argosy.distributed.layout import ParallelLayout
from argosy.models.deepseek.checkpoint import WeightShard, build_weight_mapping, find_expert_id
from argosy.models.deepseek.config import ModelConfig
from argosy.quantization.safetensors_headers import DTYPE_BYTES, TensorHeader
from argosy.quantization.stored_tensors import companion_suffix, find_stored_tensor
from argosy.quantization.tensor_boxes import resolve_index
from argosy.quantization.weight_plan import ParameterSpec, WeightMapping, parts_to_read, plan_weights

MODEL_PARTS = (
    "attention", "experts", "shared experts", "dense", "embedding + head", "router", "norms", "scales",
    "MTP projection",
)  # fmt: skip

# Of a tensor's or a parameter's name; the first that it holds says which part of the model it is.
_PART_OF_NAME = (
    ("norm", "norms"),
    (".self_attn.", "attention"),
    (".mlp.experts.", "experts"),
    (".mlp.shared_experts.", "shared experts"),
    (".mlp.gate.", "router"),
    (".mlp.", "dense"),
    ("eh_proj", "MTP projection"),
    ("embed_tokens", "embedding + head"),
    ("head", "embedding + head"),
)
# An MTP layer's copies of the model's own embedding and head, which it will share.
_MTP_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")


@dataclass(frozen=True, slots=True)
class PartBytes:
    """One part of the model on one rank."""

    part: str  # of MODEL_PARTS
    read_bytes: int
    memory_bytes: int
    mtp_bytes: int  # what MTP layers would add to what is read; they are not loaded


@dataclass(frozen=True, slots=True)
class RankLoadPlan:
    """Ranks that read and hold equal amounts."""

    ranks: tuple[int, ...]
    parts: tuple[PartBytes, ...]  # in the order of MODEL_PARTS

    @property
    def read_bytes(self) -> int:
        """Of each rank."""
        return sum(each.read_bytes for each in self.parts)

    @property
    def memory_bytes(self) -> int:
        return sum(each.memory_bytes for each in self.parts)

    @property
    def mtp_bytes(self) -> int:
        return sum(each.mtp_bytes for each in self.parts)


def plan_load(
    headers: Mapping[str, TensorHeader],
    model_config: ModelConfig,
    layout: ParallelLayout,
    parameters: Mapping[str, ParameterSpec],
    block_size: tuple[int, int],
) -> list[RankLoadPlan]:
    """All ranks of ``layout``, those with equal amounts together. ``parameters``: of any rank's share of the model.

    Raises:
        ValueError: what the loader would refuse before it reads a byte.
    """
    memory: Counter[str] = Counter()
    for name, parameter in parameters.items():
        memory[part_of_model(name)] += prod(parameter.shape) * DTYPE_BYTES[parameter.dtype]
    ranks_of_shard: dict[WeightShard, list[int]] = {}
    for rank in range(layout.world_size):
        ranks_of_shard.setdefault(_weight_shard(layout, rank, model_config), []).append(rank)
    by_expert = _sort_by_expert(headers)
    ranks_of: dict[tuple[PartBytes, ...], list[int]] = {}
    for shard, ranks in ranks_of_shard.items():
        own = _take_own(by_expert, shard)
        read = _count_loaded(own, model_config, shard, parameters, block_size)
        mtp = _count_mtp(own, model_config, shard, block_size)
        parts = tuple(PartBytes(part, read[part], memory[part], mtp[part]) for part in MODEL_PARTS)
        ranks_of.setdefault(parts, []).extend(ranks)
    return [RankLoadPlan(tuple(sorted(ranks)), parts) for parts, ranks in ranks_of.items()]


def part_of_model(name: str) -> str:
    """``name``: of a checkpoint's tensor or of a parameter."""
    if companion_suffix(name) is not None:
        return "scales"
    return next(part for text, part in _PART_OF_NAME if text in name)


def _weight_shard(layout: ParallelLayout, rank: int, model_config: ModelConfig) -> WeightShard:
    coords = layout.coords(rank)
    expert_ids = layout.local_expert_ids(coords.ep, model_config.n_routed_experts)
    return WeightShard(tp_rank=coords.tp, tp_size=layout.tp_size, expert_ids=expert_ids)


def _sort_by_expert(headers: Mapping[str, TensorHeader]) -> dict[int | None, dict[str, TensorHeader]]:
    """So that the names of 256 experts are not judged again for every rank. None: of no routed expert."""
    by_expert: dict[int | None, dict[str, TensorHeader]] = {}
    for name, header in headers.items():
        by_expert.setdefault(find_expert_id(name), {})[name] = header
    return by_expert


def _take_own(by_expert: dict[int | None, dict[str, TensorHeader]], shard: WeightShard) -> dict[str, TensorHeader]:
    """Everything but other ranks' experts."""
    own: dict[str, TensorHeader] = {}
    for expert_id, headers in by_expert.items():
        if expert_id is None or shard.expert_ids is None or expert_id in shard.expert_ids:
            own |= headers
    return own


def _count_loaded(
    headers: Mapping[str, TensorHeader],
    model_config: ModelConfig,
    shard: WeightShard,
    parameters: Mapping[str, ParameterSpec],
    block_size: tuple[int, int],
) -> Counter[str]:
    mapping = build_weight_mapping(model_config.num_hidden_layers, model_config.num_nextn_predict_layers, shard)
    count: Counter[str] = Counter()
    for copy in plan_weights(headers, parameters, mapping, block_size):
        for part in (copy.part, copy.scale, copy.offset):
            if part is not None:
                count[part_of_model(part.tensor_name)] += part.num_bytes
    return count


def _count_mtp(
    headers: Mapping[str, TensorHeader], model_config: ModelConfig, shard: WeightShard, block_size: tuple[int, int]
) -> Counter[str]:
    """As if the MTP layers were loaded as they are stored."""
    first, num_layers = model_config.num_hidden_layers, model_config.num_nextn_predict_layers
    prefixes = tuple(f"model.layers.{layer_id}." for layer_id in range(first, first + num_layers))
    mapping: WeightMapping = build_weight_mapping(first + num_layers, 0, shard)
    count: Counter[str] = Counter()
    for name in headers:
        if not name.startswith(prefixes) or name.endswith(_MTP_COPIES) or companion_suffix(name) is not None:
            continue
        destination = mapping(name)
        if destination is not None:
            stored = find_stored_tensor(name, headers, block_size)
            for part in parts_to_read(stored, resolve_index(destination.source, stored.header.shape, repr(name))[1]):
                count[part_of_model(part.tensor_name)] += part.num_bytes
    return count
