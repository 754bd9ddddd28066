"""The row that carries a token to another rank: payload, expert ids and weights in one message of 32-bit words.

One message means one collective: three small ones would cost three latencies; and one concatenation makes it, for a
small exchange is bound by launches. Rows are whole 16 bytes, so that copies are vectorised. Invariant: ``unpack`` of a
packed row gives ids and weights bit by bit, and the decoded payload, or the rows in 8 bits that were packed.

Shape letters: T tokens, N rows, D hidden, K experts per token, W words of a row.
"""

import torch
import torch.nn.functional as F

from argosy.distributed.ep_payload import PayloadCodec, check_width
from argosy.distributed.ep_types import WORD_BYTES, PackedTokens, QuantizedRows


def pack_tokens(
    x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, codec: PayloadCodec
) -> PackedTokens:
    """``x: [T, D]``, ``topk_ids: [T, K]`` int32, ``topk_weights: [T, K]`` f32. Quantised rows travel as they are."""
    if isinstance(x, QuantizedRows):
        hidden_size = x.numbers.shape[1]
        check_width(x.numbers, hidden_size)
        payload = _as_words(x.numbers), x.scale.view(torch.int32)
        return PackedTokens(payload, topk_ids, topk_weights, hidden_size, x.dtype, x.numbers.dtype)
    return PackedTokens(codec.encode(x), topk_ids, topk_weights, x.shape[1], x.dtype)


def pad_rows(tokens: PackedTokens, num_rows: int) -> torch.Tensor:
    """-> [num_rows, W]: token i in row i, empty rows behind.

    An empty row holds zeros and the ids -1: a peer that computes with it meets no NaN.
    """
    rows, num_tokens = tokens.rows, tokens.topk_ids.shape[0]
    if num_tokens == num_rows:
        return rows
    padded = F.pad(rows, (0, 0, 0, num_rows - num_tokens))
    padded[num_tokens:, tokens.payload_words : tokens.payload_words + tokens.num_experts_per_tok] = -1
    return padded


def unpack(
    message: torch.Tensor, tokens: PackedTokens, codec: PayloadCodec
) -> tuple[torch.Tensor | QuantizedRows, torch.Tensor, torch.Tensor]:
    """``message: [N, W]``, rows like those of ``tokens`` -> x [N, D], topk_ids [N, K], topk_weights [N, K]."""
    middle = tokens.payload_words + tokens.num_experts_per_tok
    end = middle + tokens.num_experts_per_tok
    ids, weights = message[:, tokens.payload_words : middle], message[:, middle:end].view(torch.float32)
    words = message[:, : tokens.payload_words]
    if tokens.quantized_dtype is None:
        return codec.decode(words, tokens.hidden_size, tokens.dtype), ids, weights
    num_words = tokens.hidden_size // WORD_BYTES
    numbers, scale = words[:, :num_words].view(tokens.quantized_dtype), words[:, num_words:].view(torch.float32)
    return QuantizedRows(numbers, scale, tokens.dtype), ids, weights


def _as_words(numbers: torch.Tensor) -> torch.Tensor:
    """``numbers: [T, D]`` in 8 bits -> [T, D / 4] int32. Without tokens strides may be such that torch refuses."""
    if numbers.shape[0] == 0:
        return numbers.new_empty(0, numbers.shape[1] // WORD_BYTES, dtype=torch.int32)
    return numbers.view(torch.int32)
