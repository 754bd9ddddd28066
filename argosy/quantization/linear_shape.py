"""The sizes of one linear of the model: of the checkpoint's tensors, and of the part that a rank holds of them.

Arithmetic only. Invariant: ``in_parts`` divides ``in_features`` and ``out_parts`` divides ``out_features``.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """One matrix product, of one checkpoint tensor [out_features, in_features] or of several joined along dim 0."""

    in_features: int
    out_features: int  # of each joined tensor
    in_parts: int = 1  # row_parallel: ranks that share each row
    out_parts: int = 1  # column_parallel: ranks that share the rows of each joined tensor
    num_joined: int = 1  # 2 for gate_up_proj

    @property
    def local_in_features(self) -> int:
        return self.in_features // self.in_parts

    @property
    def local_out_features(self) -> int:
        return self.num_joined * (self.out_features // self.out_parts)
