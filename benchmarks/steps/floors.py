"""The least time each part of a step could take on one card, from its bytes and operations alone.

Rates are what public kernels reach on an H200, not what its data sheet promises. A part's pieces are added, for they
run one after another; each takes the longer of its operations and its bytes. Attention is counted over the selected
positions in the absorbed algebra: where another is cheaper, a part can come out below its floor. Invariant: pure
arithmetic on sizes.

Shape letters: T tokens, D hidden, H heads, R kv_lora_rank, P rope, C = R + P, N nope, V value, J index heads, I their
size, E experts, K of them per token, F expert width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from argosy.config import CacheDTypes
from argosy.models.deepseek.config import ModelConfig

BYTES_S = 4.3e12
LINEAR_OPS_S = {"w8a8": 1.366e15, "fp8_block": 1.353e15, "none": 757e12}
WEIGHT_BYTES = {"w8a8": 1, "fp8_block": 1, "none": 2}
PLAIN_OPS_S = 757e12
CORE_OPS_S = {"prefill": 640e12, "decode": 410e12}
PLAIN_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSizes:
    """Of one token in one layer."""

    latent_bytes: int
    index_k_bytes: int
    index_ops_s: float

    @classmethod
    def of(cls, config: ModelConfig, stored: CacheDTypes) -> "CacheSizes":
        rope_bytes, scale_bytes = PLAIN_BYTES * config.qk_rope_head_dim, 4
        is_plain, are_keys_plain = stored.latent == "model", stored.index_key == "model"
        return cls(
            latent_bytes=rope_bytes
            + (PLAIN_BYTES * config.kv_lora_rank if is_plain else config.kv_lora_rank + scale_bytes),
            index_k_bytes=PLAIN_BYTES * config.index_head_dim
            if are_keys_plain
            else config.index_head_dim + scale_bytes,
            index_ops_s=PLAIN_OPS_S if are_keys_plain else LINEAR_OPS_S["w8a8"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """What a step computes."""

    num_tokens: int
    num_selected: int  # positions attended to, all tokens together
    num_scored: int  # positions that the indexer scores, all tokens together; 0: every position is selected
    latent_rows: int  # cached positions that attention must read at least once a layer
    index_rows: int  # the same for the indexer
    num_sampled: int
    is_decode: bool

    @classmethod
    def decode(cls, config: ModelConfig, batch_size: int, context: int) -> "StepSizes":
        length, topk = context + 1, config.index_topk
        return cls(
            num_tokens=batch_size,
            num_selected=batch_size * min(topk, length),
            num_scored=batch_size * length if length > topk else 0,
            latent_rows=batch_size * min(topk, length),
            index_rows=batch_size * length if length > topk else 0,
            num_sampled=batch_size,
            is_decode=True,
        )

    @classmethod
    def prefill(cls, config: ModelConfig, start: int, num_tokens: int) -> "StepSizes":
        """The chunk of a request that begins at ``start``; sampling is taken to be its own."""
        end, topk = start + num_tokens, config.index_topk
        return cls(
            num_tokens=num_tokens,
            num_selected=sum(min(topk, position + 1) for position in range(start, end)),
            num_scored=sum(range(start + 1, end + 1)) if end > topk else 0,
            latent_rows=end,
            index_rows=end if end > topk else 0,
            num_sampled=1,
            is_decode=False,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSizes:
    """What one rank's experts compute in one layer."""

    num_rows: float  # tokens times the experts of this rank that they go to
    num_hit: float  # experts with a row


@dataclass(frozen=True, slots=True)
class Piece:
    """One kernel's share of a part, in one layer or in the step."""

    part: str
    num_ops: float
    num_bytes: float
    ops_s: float = PLAIN_OPS_S

    @property
    def us(self) -> float:
        return 1e6 * max(self.num_ops / self.ops_s, self.num_bytes / BYTES_S)


def floors_us(
    config: ModelConfig, step: StepSizes, experts: ExpertSizes, cache: CacheSizes, quantization: str
) -> dict[str, float]:
    """Microseconds by part, of the whole step."""
    floors: dict[str, float] = {}
    num_moe = config.num_hidden_layers - config.first_k_dense_replace
    layers = (
        (config.num_hidden_layers, attention_pieces(config, step, cache, quantization)),
        (config.num_hidden_layers, indexer_pieces(config, step, cache, quantization)),
        (config.num_hidden_layers, elementwise_pieces(config, step, quantization)),
        (num_moe, moe_pieces(config, step, experts, quantization)),
        (config.first_k_dense_replace, mlp_pieces("dense MLP", config, config.intermediate_size, step, quantization)),
        (1, head_pieces(config, step)),
    )
    for count, pieces in layers:
        for piece in pieces:
            floors[piece.part] = floors.get(piece.part, 0.0) + count * piece.us
    return floors


def attention_pieces(config: ModelConfig, step: StepSizes, cache: CacheSizes, quantization: str) -> Iterator[Piece]:
    """Of one layer, in the absorbed algebra."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    tokens, latent, width = step.num_tokens, config.latent_dim, heads * config.v_head_dim
    name = "attention projections"
    yield _linear(name, tokens, hidden, config.q_lora_rank + latent, quantization)
    yield _linear(name, tokens, config.q_lora_rank, heads * config.qk_head_dim, quantization)
    for size in (config.qk_nope_head_dim, config.v_head_dim):  # absorb and unabsorb, never quantised
        moved = heads * rank * size + tokens * heads * (rank + size)
        yield Piece(name, 2 * tokens * heads * rank * size, PLAIN_BYTES * moved)
    yield _linear(name, tokens, width, hidden, quantization)
    queries = PLAIN_BYTES * tokens * heads * (latent + rank)
    yield Piece(
        "core",
        2 * step.num_selected * heads * (latent + rank),
        step.latent_rows * cache.latent_bytes + queries,
        CORE_OPS_S["decode" if step.is_decode else "prefill"],
    )


def indexer_pieces(config: ModelConfig, step: StepSizes, cache: CacheSizes, quantization: str) -> Iterator[Piece]:
    """Of one layer; keys are written in any case."""
    tokens, heads, size = step.num_tokens, config.index_n_heads, config.index_head_dim
    yield _linear("indexer", tokens, config.hidden_size, size, quantization)
    if not step.num_scored:
        return
    yield _linear("indexer", tokens, config.q_lora_rank, heads * size, quantization)
    yield Piece(
        "indexer", 2 * tokens * config.hidden_size * heads, config.hidden_size * (4 * heads + PLAIN_BYTES * tokens)
    )
    scores = 4 * step.num_scored
    queries = PLAIN_BYTES * tokens * heads * size
    yield Piece(
        "indexer",
        2 * step.num_scored * heads * size,
        step.index_rows * cache.index_k_bytes + queries + scores,
        cache.index_ops_s,
    )
    yield Piece("top-k", 0, scores + 8 * tokens * config.index_topk)


def elementwise_pieces(config: ModelConfig, step: StepSizes, quantization: str) -> Iterator[Piece]:
    """Of one layer: norms with what they add, rotations and cache rows, inputs quantised."""
    tokens, hidden = step.num_tokens, config.hidden_size
    # Reads and writes of a row: the input norm 2, the sum and norm behind attention 4, the sum behind the MLP 3.
    yield Piece("norms", 0, PLAIN_BYTES * tokens * (9 * hidden + 2 * config.q_lora_rank))
    rotated = (config.num_attention_heads + config.index_n_heads) * config.qk_rope_head_dim
    cached = config.latent_dim + config.index_head_dim
    yield Piece("rope and cache", 0, PLAIN_BYTES * tokens * (2 * rotated + 2 * cached))
    if quantization != "none":
        inputs = hidden + config.q_lora_rank + config.num_attention_heads * config.v_head_dim
        yield Piece("quantise", 0, (PLAIN_BYTES + 1) * tokens * inputs)


def moe_pieces(config: ModelConfig, step: StepSizes, experts: ExpertSizes, quantization: str) -> Iterator[Piece]:
    """Of one MoE layer."""
    tokens, hidden, width = step.num_tokens, config.hidden_size, config.moe_intermediate_size
    routed = config.n_routed_experts
    yield Piece("router", 2 * tokens * hidden * routed, hidden * (4 * routed + PLAIN_BYTES * tokens))
    weight_bytes = WEIGHT_BYTES[quantization]
    for in_size, out_size in ((hidden, 2 * width), (width, hidden)):
        moved = weight_bytes * (experts.num_hit * in_size * out_size + experts.num_rows * in_size)
        moved += PLAIN_BYTES * experts.num_rows * out_size
        yield Piece("experts", 2 * experts.num_rows * in_size * out_size, moved, LINEAR_OPS_S[quantization])
    yield from mlp_pieces("shared", config, config.n_shared_experts * width, step, quantization)
    rows = PLAIN_BYTES * (tokens + experts.num_rows) * hidden  # to the experts, and as much back
    yield Piece("arrange", 0, 2 * rows)
    if quantization != "none":
        yield Piece("quantise", 0, experts.num_rows * ((PLAIN_BYTES + 1) * hidden + (4 + 1) * width))


def mlp_pieces(part: str, config: ModelConfig, width: int, step: StepSizes, quantization: str) -> Iterator[Piece]:
    """Of one gated MLP."""
    yield _linear(part, step.num_tokens, config.hidden_size, 2 * width, quantization)
    yield _linear(part, step.num_tokens, width, config.hidden_size, quantization)


def head_pieces(config: ModelConfig, step: StepSizes) -> Iterator[Piece]:
    """Of the step."""
    weight = PLAIN_BYTES * config.vocab_size * config.hidden_size
    logits = 4 * step.num_sampled * config.vocab_size
    yield Piece("head", 2 * step.num_sampled * config.vocab_size * config.hidden_size, weight + logits)
    yield Piece("sampling and inputs", 0, logits)


def _linear(part: str, num_tokens: int, in_size: int, out_size: int, quantization: str) -> Piece:
    weight_bytes = WEIGHT_BYTES[quantization]
    moved = weight_bytes * (in_size * out_size + num_tokens * in_size) + PLAIN_BYTES * num_tokens * out_size
    return Piece(part, 2 * num_tokens * in_size * out_size, moved, LINEAR_OPS_S[quantization])


def linear_flop_per_token(config: ModelConfig, num_experts: float | None = None) -> float:
    """2 x the weights that a token is multiplied by, without embedding and head; ``num_experts``: None = K."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    index = (
        config.index_n_heads * (config.q_lora_rank * config.index_head_dim + hidden) + hidden * config.index_head_dim
    )
    attention = hidden * (config.q_lora_rank + config.latent_dim) + config.q_lora_rank * heads * config.qk_head_dim
    attention += rank * heads * (config.qk_nope_head_dim + config.v_head_dim) + heads * config.v_head_dim * hidden
    expert = 3 * hidden * config.moe_intermediate_size
    num_experts = config.num_experts_per_tok if num_experts is None else num_experts
    moe = expert * (num_experts + config.n_shared_experts) + hidden * config.n_routed_experts
    dense = 3 * hidden * config.intermediate_size
    num_dense = config.first_k_dense_replace
    num_moe = config.num_hidden_layers - num_dense
    return 2.0 * (config.num_hidden_layers * (attention + index) + num_moe * moe + num_dense * dense)


def attention_flop(config: ModelConfig, step: StepSizes) -> float:
    """Of all layers: products of absorbed queries with selected rows, and of index queries with index keys."""
    core = 2.0 * step.num_selected * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
    scores = 2.0 * step.num_scored * config.index_n_heads * config.index_head_dim
    return config.num_hidden_layers * (core + scores)
