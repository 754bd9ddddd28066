"""Log probabilities in the shapes that clients know: OpenAI's for completions, vLLM's for prompts.

It computes none. What may be long is written as JSON in pieces, between which others have their turn. Invariant:
``text_offset`` points into the text of the choice, whatever bytes its tokens hold.
"""

import asyncio
import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import msgspec

from argosy.engine.prompts import CheckedPrompt
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import TokenLogprobs
from argosy.sampling_params import SamplingParams
from argosy.server.errors import ApiError

MAX_PROMPT_LOGPROBS = 2**19  # in one answer: to write them out takes the server about a second
PIECE_SIZE = 1024  # log probabilities; to write so many takes milliseconds, in which all wait

_NewUtf8Decoder = codecs.getincrementaldecoder("utf-8")
_encode = msgspec.json.Encoder().encode


class TextOffsets:
    """Where each token begins in a text that grows token by token; inside a character is where the character begins."""

    def __init__(self, start: int = 0) -> None:
        self._end = start
        self._decoder = _NewUtf8Decoder("replace")

    def add(self, piece: bytes) -> int:
        """``piece``: what the next token adds to the text."""
        offset = self._end
        self._end += len(self._decoder.decode(piece))
        return offset


def describe_logprobs(
    tokenizer: Tokenizer,
    token_ids: Iterable[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    num_top: int,
) -> dict[str, list[object]]:
    """OpenAI's completion shape, of parallel lists; the first token of a prompt has no entry."""
    return {
        "tokens": [token_text(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
        "top_logprobs": [None if entry is None else _describe_tops(tokenizer, entry, num_top) for entry in entries],
        "text_offset": list(offsets),
    }


def describe_prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None], num_top: int
) -> list[dict[int, dict[str, object]] | None]:
    """vLLM's ``prompt_logprobs``: by token id, of the prompt's own token and of the likeliest."""
    described: list[dict[int, dict[str, object]] | None] = []
    for entry in entries:
        if entry is None:
            described.append(None)
            continue
        own = {entry.token_id: _describe_ranked(tokenizer, entry.token_id, entry.logprob, entry.rank)}
        tops = islice(zip(entry.top_token_ids, entry.top_logprobs, strict=True), num_top)
        described.append(
            own
            | {
                token_id: _describe_ranked(tokenizer, token_id, logprob, rank)
                for rank, (token_id, logprob) in enumerate(tops, start=1)
            }
        )
    return described


async def write_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Iterator[int],
    num_top: int,
) -> Mapping[str, object]:
    """``describe_logprobs`` as JSON, of any length; ``offsets`` are found on the way."""

    def describe(start: int, stop: int) -> Mapping[str, object]:
        part = list(islice(offsets, stop - start))
        return describe_logprobs(tokenizer, token_ids[start:stop], entries[start:stop], part, num_top)

    return await _write_columns(len(entries), 1 + num_top, describe)


async def write_prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None], num_top: int
) -> msgspec.Raw:
    """``describe_prompt_logprobs`` as JSON, of any length."""

    def describe(start: int, stop: int) -> Mapping[str, object]:
        return {"": describe_prompt_logprobs(tokenizer, entries[start:stop], num_top)}

    return (await _write_columns(len(entries), 1 + num_top, describe))[""]


async def write_entries(entries: Sequence[TokenLogprobs | None]) -> msgspec.Raw:
    """The entries themselves as JSON, of any length."""
    num_each = 1 + max((len(entry.top_logprobs) for entry in entries if entry is not None), default=0)
    return (await _write_columns(len(entries), num_each, lambda start, stop: {"": entries[start:stop]}))[""]


def find_prompt_offsets(tokenizer: Tokenizer, prompt: CheckedPrompt, text: str) -> Iterator[int]:
    """Where each of the prompt's tokens begins in ``text``, as ``echo`` shows it."""
    shows_special = prompt.text is not None  # a text may spell out special tokens; of ids they are left out
    pieces = [tokenizer.byte_table(skip_special_tokens=not shows_special)[token_id] for token_id in prompt.token_ids]
    if shows_special and not text.encode().startswith(pieces[0]):
        pieces[0] = b""  # begin of sentence, which the tokenizer has put in front
    offsets = TextOffsets()
    return map(offsets.add, pieces)


def check_num_prompt_logprobs(prompts: Sequence[CheckedPrompt], params: SamplingParams) -> None:
    """Raises ApiError if an answer would be too long to be written while others wait."""
    if params.prompt_logprobs is None:
        return
    num_tokens = params.n * sum(len(prompt.token_ids) for prompt in prompts)
    num_values = num_tokens * (1 + params.prompt_logprobs)
    if num_values > MAX_PROMPT_LOGPROBS:
        raise ApiError(
            400,
            f"{num_tokens} prompt tokens with {params.prompt_logprobs} alternatives each are {num_values} log "
            f"probabilities; at most {MAX_PROMPT_LOGPROBS} are told in one answer; ask for fewer alternatives, or send "
            "the prompts in several requests",
            param="prompt_logprobs",
        )


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token alone; bytes that are no whole character become U+FFFD."""
    return tokenizer.byte_table(skip_special_tokens=False)[token_id].decode(errors="replace")


async def _write_columns(
    num_tokens: int, num_each: int, describe: Callable[[int, int], Mapping[str, object]]
) -> dict[str, msgspec.Raw]:
    """JSON lists of what ``describe(start, stop)`` says of tokens; ``num_each``: log probabilities of one token."""
    size = max(1, PIECE_SIZE // num_each)
    columns: dict[str, list[bytes]] = {}
    for start in range(0, num_tokens, size):
        for name, values in describe(start, min(start + size, num_tokens)).items():
            columns.setdefault(name, []).append(_encode(values)[1:-1])
        await asyncio.sleep(0)
    return {name: msgspec.Raw(b"[%b]" % b",".join(parts)) for name, parts in columns.items()}


def _describe_tops(tokenizer: Tokenizer, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
    """By text, the token's own first. Of tokens with equal texts, as parts of characters have, the likeliest counts."""
    tops: dict[str, float] = {token_text(tokenizer, entry.token_id): entry.logprob}
    for token_id, logprob in islice(zip(entry.top_token_ids, entry.top_logprobs, strict=True), num_top):
        text = token_text(tokenizer, token_id)
        tops[text] = max(logprob, tops.get(text, logprob))
    return tops


def _describe_ranked(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int) -> dict[str, object]:
    return {"logprob": logprob, "rank": rank, "decoded_token": token_text(tokenizer, token_id)}
