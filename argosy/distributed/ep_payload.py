"""In what precision a token's hidden state travels to its experts: as it is, INT8 per token, or FP8 per 128 numbers.

A codec turns rows into 32-bit words and back; it knows no ranks. Rows that were quantised for the experts need none.
Invariant: what comes back depends on the row alone,
so a token's experts see the same numbers on every topology.

Shape letters: T tokens, D hidden, W words of a row.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from argosy.distributed.ep_types import WORD_BYTES

PayloadKind = Literal["model", "int8", "fp8"]
INT8_MAX = 127.0
FP8_MAX = 448.0  # of float8_e4m3fn
FP8_BLOCK_SIZE = 128
# A row of zeros has this amax, so that its scale divides.
MIN_AMAX = 1e-12


class PayloadCodec(Protocol):
    """Rows to words and back."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x: [T, D]`` -> int32 parts, each [T, ...]; beside each other they are [T, W]."""
        ...

    def decode(self, words: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """``words: [T, W]``, rows may be strided -> [T, hidden_size] in ``dtype``; may be a view of ``words``."""
        ...


class ModelPayload:
    """The model's own dtype: nothing is computed."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_width(x, x.shape[1] * x.element_size())
        return (x.contiguous().view(torch.int32),)

    def decode(self, words: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        return words.view(dtype)


class Int8Payload:
    """Symmetric INT8, one float32 scale a token, half to even, [-127, 127]."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_width(x, x.shape[1])
        numbers = x.float()
        scale = numbers.abs().amax(dim=1, keepdim=True).clamp_(min=MIN_AMAX) / INT8_MAX  # [T, 1]
        quantized = (numbers / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        return quantized.view(torch.int32), scale.view(torch.int32)

    def decode(self, words: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        num_words = hidden_size // WORD_BYTES
        scale = words[:, num_words:].view(torch.float32)
        return (words[:, :num_words].view(torch.int8) * scale).to(dtype)


class Fp8Payload:
    """FP8 e4m3, one float32 scale for 128 numbers; a last, shorter block has its own."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden_size = x.shape[1]
        check_width(x, hidden_size)
        num_blocks = _num_blocks(hidden_size)
        padded = F.pad(x.float(), (0, num_blocks * FP8_BLOCK_SIZE - hidden_size))
        blocks = padded.view(x.shape[0], num_blocks, FP8_BLOCK_SIZE)
        scale = blocks.abs().amax(dim=2, keepdim=True).clamp_(min=MIN_AMAX) / FP8_MAX  # [T, blocks, 1]
        # The quotient may exceed 448 by a rounding, and the cast would then make it NaN.
        quantized = (blocks / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).flatten(1)[:, :hidden_size]
        return quantized.view(torch.int32), scale.squeeze(2).view(torch.int32)

    def decode(self, words: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        num_words = hidden_size // WORD_BYTES
        scale = words[:, num_words:].view(torch.float32)
        scales = scale.repeat_interleave(FP8_BLOCK_SIZE, dim=1)[:, :hidden_size]  # an int repeat: no sync
        return (words[:, :num_words].view(torch.float8_e4m3fn).float() * scales).to(dtype)


def build_payload(kind: PayloadKind) -> PayloadCodec:
    codecs: dict[PayloadKind, PayloadCodec] = {"model": ModelPayload(), "int8": Int8Payload(), "fp8": Fp8Payload()}
    if kind not in codecs:
        raise ValueError(f"ep_payload ({kind!r}) must be one of {', '.join(codecs)}; set --ep-payload")
    return codecs[kind]


def _num_blocks(hidden_size: int) -> int:
    return (hidden_size + FP8_BLOCK_SIZE - 1) // FP8_BLOCK_SIZE


def check_width(x: torch.Tensor, row_bytes: int) -> None:
    if row_bytes % WORD_BYTES:
        raise ValueError(
            f"hidden_size ({x.shape[1]}): a row of {row_bytes} bytes is not whole 4-byte words, which expert"
            " parallelism sends; use a hidden_size divisible by 4, or --ep 1"
        )
