"""Which number format every linear of a model is stored and computed in: chosen once, from names, when it is built.

Schemes make modules, whose forward pass does not know that there was a choice. Nothing is loaded or computed here.
Invariant: what a module is follows from its checkpoint name, its shape and the settings, so all ranks choose alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from argosy.config import QuantizationName
from argosy.quantization.checkpoint_format import CheckpointQuantization, WeightFormat
from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE
from argosy.quantization.fp8_linear import FP8BlockExperts, FP8BlockLinear
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.plain_scheme import PlainLinear, PlainScheme
from argosy.quantization.w8a8_grouped_gemm import W8A8Experts
from argosy.quantization.w8a8_linear import W8A8Linear

UNQUANTIZED = CheckpointQuantization()
FP8_ROW_MULTIPLE = 16  # what the cards' FP8 product asks of a matrix's rows


class LinearScheme(Protocol):
    """Makes linears of one number format."""

    def fits(self, shape: LinearShape) -> bool:
        """Whether this format can hold a rank's part of such a linear."""
        ...

    def build_linear(self, shape: LinearShape) -> nn.Module:
        """A ``PreparingLinear``, an nn.Module, with uninitialised parameters, on torch's default device."""
        ...


class ExpertScheme(Protocol):
    """Makes stacked routed experts of one number format."""

    def fits(self, shape: LinearShape) -> bool:
        """As ``LinearScheme.fits``."""
        ...

    def build_experts(self, num_local_experts: int, hidden_size: int, expert_width: int) -> nn.Module:
        """A module ``DispatchedTokens`` -> output rows in their form, with uninitialised parameters."""
        ...


class Scheme(LinearScheme, ExpertScheme, Protocol):
    """A number format of both."""


@dataclass(frozen=True, slots=True)
class Schemes:
    """Answers which scheme a module has, by its name below ``prefix``."""

    plain: PlainScheme
    quantized: Scheme  # of modules that ``quantization`` names
    quantization: CheckpointQuantization
    prefix: str = ""  # "model.layers.3.mlp."

    def at(self, name: str) -> "Schemes":
        """The chooser for the modules of ``name``."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def build_linear(self, names: tuple[str, ...], shape: LinearShape) -> nn.Module:
        """The linear that the checkpoint's ``names`` are, joined along out_features.

        Raises:
            ValueError: some of ``names`` are quantised and some are not.
        """
        if self._are_quantized(names) and self.quantized.fits(shape):
            return self.quantized.build_linear(shape)
        return self.plain.build_linear(shape)

    def build_plain_linear(self, shape: LinearShape) -> PlainLinear:
        """For a weight that is read, not only multiplied by: whatever the checkpoint holds, dequantised on load."""
        return self.plain.build_linear(shape)

    def build_experts(self, expert_ids: range, hidden_size: int, expert_width: int) -> nn.Module:
        """The stacked experts that the checkpoint has below ``prefix``, as "3.gate_proj" and so on.

        Raises:
            ValueError: some of their linears are quantised and some are not.
        """
        is_plain = self.has_plain_experts(expert_ids, hidden_size, expert_width)
        scheme: ExpertScheme = self.plain if is_plain else self.quantized
        return scheme.build_experts(len(expert_ids), hidden_size, expert_width)

    def has_plain_experts(self, expert_ids: range, hidden_size: int, expert_width: int) -> bool:
        """Whether ``build_experts`` makes plain ones; raises as it does."""
        gate_up = LinearShape(in_features=hidden_size, out_features=expert_width, num_joined=2)
        down = LinearShape(in_features=expert_width, out_features=hidden_size)
        names = [f"{expert_id}.{kind}_proj" for expert_id in expert_ids for kind in ("gate", "up", "down")]
        return not (self._are_quantized(names) and self.quantized.fits(gate_up) and self.quantized.fits(down))

    def _are_quantized(self, names: Iterable[str]) -> bool:
        is_quantized = {name: self.quantization.is_quantized(self.prefix + name) for name in names}
        if len(set(is_quantized.values())) > 1:
            quantized = next(name for name, is_so in is_quantized.items() if is_so)
            plain = next(name for name, is_so in is_quantized.items() if not is_so)
            raise ValueError(
                f"the checkpoint stores {self.prefix + quantized!r} as {self.quantization.kind} and "
                f"{self.prefix + plain!r} plain, but they are computed together and must be stored alike; quantise "
                "both or neither, or set --quantization none"
            )
        return any(is_quantized.values())


class W8A8Scheme:
    """INT8 weights and activations. Fits everything: scales are per row, and rows are never cut across a scale."""

    def fits(self, shape: LinearShape) -> bool:
        return True

    def build_linear(self, shape: LinearShape) -> W8A8Linear:
        return W8A8Linear(shape.local_in_features, shape.local_out_features)

    def build_experts(self, num_local_experts: int, hidden_size: int, expert_width: int) -> W8A8Experts:
        return W8A8Experts(num_local_experts, hidden_size, expert_width)


class FP8BlockScheme:
    """DeepSeek's FP8 blocks. What a rank holds must be whole blocks; what is not, is plain."""

    def __init__(self, block_size: tuple[int, int], *, has_ue8m0_scales: bool) -> None:
        self._block_size = block_size
        self._has_ue8m0_scales = has_ue8m0_scales

    def fits(self, shape: LinearShape) -> bool:
        """Only the last block of an uncut matrix's rows may be ragged: ``kv_a_proj_with_mqa`` has 4.5 blocks."""
        is_cut = shape.out_parts > 1 or shape.num_joined > 1
        row_multiple = DEFAULT_BLOCK_SIZE[0] if is_cut else FP8_ROW_MULTIPLE
        return (
            self._block_size == DEFAULT_BLOCK_SIZE
            and shape.local_in_features % DEFAULT_BLOCK_SIZE[1] == 0
            and (shape.out_features // shape.out_parts) % row_multiple == 0
        )

    def build_linear(self, shape: LinearShape) -> FP8BlockLinear:
        return FP8BlockLinear(
            shape.local_in_features, shape.local_out_features, has_ue8m0_scales=self._has_ue8m0_scales
        )

    def build_experts(self, num_local_experts: int, hidden_size: int, expert_width: int) -> FP8BlockExperts:
        return FP8BlockExperts(num_local_experts, hidden_size, expert_width, has_ue8m0_scales=self._has_ue8m0_scales)


def build_schemes(dtype: torch.dtype, quantization: CheckpointQuantization = UNQUANTIZED) -> Schemes:
    """The choice for a whole model. ``dtype`` is that of plain weights and of activations between linears."""
    plain = PlainScheme(dtype)
    schemes: dict[WeightFormat, Scheme] = {
        "none": plain,
        "w8a8": W8A8Scheme(),
        "fp8_block": FP8BlockScheme(quantization.block_size, has_ue8m0_scales=quantization.has_ue8m0_scales),
    }
    return Schemes(plain, schemes[quantization.kind], quantization)


def resolve_quantization(
    setting: QuantizationName, stored: WeightFormat, *, has_fp8_compute: bool, is_dummy: bool = False
) -> WeightFormat:
    """The format that linears compute in, given ``--quantization`` and the format that the checkpoint is stored in.

    ``is_dummy``: ``stored`` is what config.json says, and there are no weights that could contradict.

    Raises:
        ValueError: the checkpoint holds another format, or the device cannot compute in this one.
    """
    if setting == "auto":
        return "none" if stored == "fp8_block" and not has_fp8_compute else stored
    if setting == "none":
        return "none"
    if setting == "fp8_block" and not has_fp8_compute:
        raise ValueError(
            "quantization 'fp8_block' needs a CUDA card of compute capability 9.0 or newer; with --quantization auto "
            "FP8 blocks are dequantised when they are loaded"
        )
    if setting == stored or is_dummy:
        return setting
    found = "unquantised weights" if stored == "none" else f"{stored} weights"
    remedy = (
        "convert it with `argosy quantize SRC DST --scheme w8a8`"
        if setting == "w8a8"
        else "give a checkpoint with FP8 blocks"
    )
    raise ValueError(
        f"quantization {setting!r} was asked for, but the checkpoint holds {found}; {remedy}, "
        "or set --quantization auto or none"
    )
