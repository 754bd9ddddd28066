"""What a checkpoint says about itself: ``config.json`` of a DeepSeek-V3.2 model, checked.

Field names are Hugging Face's, verbatim. This file holds no engine setting, and not the number format of weights
(``quantization/checkpoint_format.py`` reads that). Invariant: a ``ModelConfig`` that exists describes a model that this
package can build.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from argosy.quantization.checkpoint_format import read_raw_config

ARCHITECTURE = "DeepseekV32ForCausalLM"


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN's parameters (arXiv 2309.00071); ``factor`` 1 means plain RoPE."""

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and constants of a DeepSeek-V3.2 model.

    Raises:
        ValueError: naming the key, its value and the rule it breaks.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: YarnConfig = YarnConfig()
    num_nextn_predict_layers: int = 0
    indexer_rope_interleave: bool = False  # True only in relatives of V3.2
    torch_dtype: str = "bfloat16"
    bos_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config.json: {name} must be a positive integer, got {value!r}")
        for name in ("n_shared_experts", "num_nextn_predict_layers", "first_k_dense_replace"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"config.json: {name} must be an integer >= 0, got {value!r}")
        for name in ("routed_scaling_factor", "rms_norm_eps"):
            _check_positive_number(name, getattr(self, name))
        for name in ("norm_topk_prob", "indexer_rope_interleave"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config.json: {name} must be true or false, got {getattr(self, name)!r}")
        self._check_router()
        self._check_special_tokens()
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"config.json: qk_rope_head_dim ({self.qk_rope_head_dim}) must be even")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"config.json: index_head_dim ({self.index_head_dim}) must be at least "
                f"qk_rope_head_dim ({self.qk_rope_head_dim})"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"config.json: first_k_dense_replace ({self.first_k_dense_replace}) must not exceed "
                f"num_hidden_layers ({self.num_hidden_layers})"
            )
        if self.indexer_rope_interleave:
            raise ValueError("config.json: indexer_rope_interleave true is not DeepSeek-V3.2 and is not supported")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer for attention: latent and rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5 * m^2 with YaRN's m = 0.1 * mscale_all_dim * ln(factor) + 1 (DeepSeek's model.py)."""
        mscale = 1.0
        if self.yarn.factor > 1.0 and self.yarn.mscale_all_dim:
            mscale = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    def is_moe_layer(self, layer_id: int) -> bool:
        return layer_id >= self.first_k_dense_replace

    def _check_router(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ValueError(f"config.json: n_routed_experts ({experts}) must be divisible by n_group ({groups})")
        if self.topk_group > groups:
            raise ValueError(f"config.json: topk_group ({self.topk_group}) must not exceed n_group ({groups})")
        if self.num_experts_per_tok > self.topk_group * (experts // groups):
            raise ValueError(
                f"config.json: num_experts_per_tok ({self.num_experts_per_tok}) must not exceed the experts in "
                f"topk_group groups ({self.topk_group} x {experts // groups})"
            )
        if groups > 1 and experts // groups < 2:
            raise ValueError("config.json: a router group needs at least 2 experts (its score is a sum of the top 2)")

    def _check_special_tokens(self) -> None:
        if not self.eos_token_ids:
            raise ValueError("config.json: eos_token_id must name at least one token, got []")
        for name, token_id in (("bos_token_id", self.bos_token_id), *(("eos_token_id", i) for i in self.eos_token_ids)):
            is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_integer or not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"config.json: {name} must be an integer in [0, vocab_size = {self.vocab_size}), got {token_id!r}"
                )


_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim",
    "index_topk", "max_position_embeddings",
)  # fmt: skip

_REQUIRED = (*_POSITIVE, "n_shared_experts", "routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace")

# Values this implementation does not vary: a checkpoint that says otherwise is another model.
_FIXED = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "moe_layer_freq": (1,),
    "tie_word_embeddings": (False,),
}


def load_model_config(directory: Path) -> ModelConfig:
    """Read ``directory/config.json``.

    Raises:
        ValueError: no such file, not JSON, another architecture, missing keys or impossible values.
    """
    return parse_model_config(read_raw_config(directory))


def parse_model_config(raw: dict[str, object]) -> ModelConfig:
    """Check and convert the content of a ``config.json``; keys that do not describe the model's shape are ignored."""
    _check_architecture(raw)
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: not a complete DeepSeek-V3.2 config")
    for key, allowed in _FIXED.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"config.json: {key} is {raw[key]!r}; this engine supports {allowed[0]!r} only")
    rope_theta, yarn = _parse_rope(raw)
    bos, eos = raw.get("bos_token_id"), raw.get("eos_token_id")
    eos = 1 if eos is None else eos
    optional = {
        key: raw[key]
        for key in ("rms_norm_eps", "num_nextn_predict_layers", "indexer_rope_interleave")
        if raw.get(key) is not None
    }
    return ModelConfig(
        **{key: raw[key] for key in _REQUIRED},  # type: ignore[arg-type]
        **optional,  # type: ignore[arg-type]
        rope_theta=rope_theta,
        yarn=yarn,
        torch_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
        bos_token_id=0 if bos is None else bos,  # type: ignore[arg-type]
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),  # type: ignore[arg-type]
    )


def _check_architecture(raw: dict[str, object]) -> None:
    architectures = raw.get("architectures") or []
    is_named = isinstance(architectures, list) and ARCHITECTURE in architectures
    if raw.get("model_type") != "deepseek_v32" and not is_named:
        raise ValueError(
            f"config.json: model_type {raw.get('model_type')!r} with architectures {architectures!r} is not supported; "
            f"Argosy serves {ARCHITECTURE} (model_type deepseek_v32)"
        )


def _parse_rope(raw: dict[str, object]) -> tuple[float, YarnConfig]:
    """Accepts both spellings: ``rope_theta`` + ``rope_scaling``, and the newer ``rope_parameters``."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json: rope_scaling must be an object, got {scaling!r}")
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    _check_positive_number("rope_theta", theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), YarnConfig()
    if kind != "yarn":
        raise ValueError(f"config.json: rope scaling type {kind!r} is not supported; DeepSeek-V3.2 uses 'yarn'")
    fields = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    given = {key: scaling[key] for key in fields if scaling.get(key) is not None}
    for key, value in given.items():
        if key not in ("mscale", "mscale_all_dim") or value != 0:  # these two are switched off by 0
            _check_positive_number(f"rope_scaling's {key}", value)
    yarn = YarnConfig(**given)
    if yarn.factor < 1.0 or yarn.mscale != yarn.mscale_all_dim:
        raise ValueError(
            f"config.json: YaRN needs factor >= 1 (got {yarn.factor}) and mscale equal to mscale_all_dim "
            f"(got {yarn.mscale} and {yarn.mscale_all_dim})"
        )
    return float(theta), yarn


def _check_positive_number(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"config.json: {name} must be a positive number, got {value!r}")
