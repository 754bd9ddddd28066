"""The shape of `argosy-tiny` and the recipe that trains it.

Plain data, no torch. Invariant: every count divides by 16, so that any topology up to 16 ranks can serve it.
"""

import math
from dataclasses import asdict, dataclass

from tools.train_tiny.data.conversation import MixtureConfig, polish_mixture

TOKENIZER_ENTRIES = 3552  # fewer than vocab_size: padded logits exist and must be masked


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN as in DeepSeek-V3.2."""

    type: str = "yarn"
    factor: float = 8.0
    original_max_position_embeddings: int = 512
    beta_fast: int = 32
    beta_slow: int = 1
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    """Hugging Face's `config.json` keys, verbatim."""

    vocab_size: int = 3584
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 5
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    index_n_heads: int = 32
    index_head_dim: int = 32
    index_topk: int = 64
    n_routed_experts: int = 32
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig = YarnConfig()
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 2
    tie_word_embeddings: bool = False
    use_cache: bool = True

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Attention scale with YaRN's m squared, always applied."""
        mscale = 0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    def to_json_dict(self) -> dict[str, object]:
        """The content of config.json."""
        return {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", **asdict(self),
                "ep_size": 1, "torch_dtype": "bfloat16"}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of training."""

    name: str  # "dense", "indexer", "sparse" or "polish"
    num_steps: int
    lr_start: float  # after warm-up
    lr_end: float  # reached linearly at the last step
    num_warmup_steps: int
    num_flat_steps: int = 0  # steps at lr_start before the descent
    mixture: MixtureConfig = MixtureConfig()
    kl_every: int = 1  # train the indexers on every n-th step


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeConfig:
    """Everything about training that is not the model's shape."""

    stages: tuple[StageConfig, ...]
    num_batch_tokens: int = 49152  # tokens of one step, padding included
    group_tokens: int = 1_000_000  # tokens drawn before batches are cut by length
    bucket_lengths: tuple[int, ...] = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2304)
    mtp_loss_weight: float = 0.3
    weight_decay: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    index_lr_scale: float = 2.0  # indexers learn faster than the rest
    router_bias_rate: float = 1e-3  # load balancing step of e_score_correction_bias
    num_kl_rows: int = 2048  # query rows per batch on which an indexer is trained


def full_recipe() -> RecipeConfig:
    """The recipe of the published checkpoint."""
    return RecipeConfig(
        stages=(
            StageConfig(
                name="dense", num_steps=3200, lr_start=2e-3, lr_end=1.2e-3, num_warmup_steps=200, num_flat_steps=1600
            ),
            StageConfig(name="indexer", num_steps=300, lr_start=2e-3, lr_end=1e-3, num_warmup_steps=20),
            StageConfig(
                name="sparse", num_steps=2200, lr_start=1.2e-3, lr_end=1e-5, num_warmup_steps=50, num_flat_steps=200
            ),
            StageConfig(
                name="polish",
                num_steps=4263,
                lr_start=1.5e-3,
                lr_end=1e-5,
                num_warmup_steps=100,
                num_flat_steps=355,
                mixture=polish_mixture(),
                kl_every=2,
            ),
            StageConfig(
                name="polish",
                num_steps=1500,
                lr_start=5e-4,
                lr_end=1e-5,
                num_warmup_steps=50,
                mixture=polish_mixture(),
                kl_every=2,
            ),
        )
    )


def micro_recipe() -> RecipeConfig:
    """Every stage in a few seconds on a CPU: proves the code, not the model."""
    return RecipeConfig(
        stages=tuple(
            StageConfig(name=name, num_steps=3, lr_start=2e-3, lr_end=1e-3, num_warmup_steps=1)
            for name in ("dense", "indexer", "sparse", "polish")
        ),
        num_batch_tokens=2560,
        group_tokens=30_000,
        num_kl_rows=64,
    )
