"""Every operation of the model as one function: specified in ``reference.py``; ``choice.py`` picks what runs."""

from argosy.kernels.choice import (
    grouped_mlp,
    positions_to_slots,
    rms_norm,
    route_grouped_topk,
    select_topk_positions,
)
from argosy.kernels.reference import (
    RotaryRows,
    RotaryTable,
    attend_absorbed,
    attend_expanded,
    attend_sparse,
    gather_cache,
    grouped_gemm,
    grouped_gemm_loop,
    index_scores,
    layer_norm,
    linear_fp32,
    rope_half_split_,
    rope_interleaved_,
    silu_mul,
    write_cache,
)
from argosy.kernels.reference_experts import grouped_mlp_masked, grouped_mlp_masked_loop

__all__ = [
    "RotaryRows",
    "RotaryTable",
    "attend_absorbed",
    "attend_expanded",
    "attend_sparse",
    "gather_cache",
    "grouped_gemm",
    "grouped_gemm_loop",
    "grouped_mlp",
    "grouped_mlp_masked",
    "grouped_mlp_masked_loop",
    "index_scores",
    "layer_norm",
    "linear_fp32",
    "positions_to_slots",
    "rms_norm",
    "rope_half_split_",
    "rope_interleaved_",
    "route_grouped_topk",
    "select_topk_positions",
    "silu_mul",
    "write_cache",
]
