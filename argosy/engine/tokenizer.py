"""Text to token ids and back: a byte-level BPE ``tokenizer.json`` as DeepSeek ships it, read without any remote code.

It does not stream (``detokenizer.py`` does) and knows no chat format. Invariant: the bytes of a token do not depend on
its neighbours, so decoding is joining ``token_bytes`` and reading the result as UTF-8.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from argosy.grammar.compiler import Vocabulary
from argosy.models.deepseek.encoding import DSML_TOKEN

_LONG_CHARS = 1024  # a text that takes milliseconds
_NO_NORMALIZER = ("", '{"type":"Sequence","normalizers":[]}')
_KEEPING_SPLITTERS = {"Sequence", "Split", "Digits", "ByteLevel"}
_MAX_BYTE = 0xFF
_NOT_A_BYTE = 0x10FFFF  # no tokenizer uses it; latin-1 cannot encode it, which is the point


class Tokenizer:
    """A tokenizer and its begin- and end-of-sentence ids.

    ``vocab_size`` is the number of ids the tokenizer knows; a model's may be larger (padded), never smaller.
    ``eos_token_ids`` is every id that ends an answer, ``eos_token_id`` the first of them. ``special_token_ids`` are
    left out of the text by ``skip_special_tokens``. ``adds_bos``: ``encode_prompt`` puts ``bos_token_id`` in front.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, bos_token_id: int | None, eos_token_ids: tuple[int, ...], adds_bos: bool
    ) -> None:
        """Takes over ``backend``. Prefer ``from_directory``.

        Raises:
            ValueError: not a byte-level BPE, or ids that it does not know.
        """
        if not isinstance(backend.model, tokenizers.models.BPE) or not isinstance(
            backend.decoder, tokenizers.decoders.ByteLevel
        ):
            raise ValueError(
                f"the tokenizer must be a byte-level BPE, but its model is {type(backend.model).__name__} and its "
                f"decoder {type(backend.decoder).__name__}; use the tokenizer.json that belongs to the model"
            )
        backend.no_truncation()
        backend.no_padding()
        assert eos_token_ids, "a model that cannot end is refused by from_directory"
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = _build_token_bytes(backend)
        self._shown_bytes = [
            b"" if token_id in self.special_token_ids else piece for token_id, piece in enumerate(self._token_bytes)
        ]
        self._max_token_bytes = max(map(len, self._token_bytes)) if _keeps_every_byte(backend) else 0
        self.vocab_size = len(self._token_bytes)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = eos_token_ids[0]
        self.adds_bos = adds_bos and bos_token_id is not None
        self.check_token_ids(eos_token_ids, "eos_token_id")
        if bos_token_id is not None:
            self.check_token_ids([bos_token_id], "bos_token_id")

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads ``tokenizer.json``, and where present generation_config.json, config.json and tokenizer_config.json.

        The bos and eos ids come from the first of these three that names them. ``adds_bos`` is tokenizer_config's
        ``add_bos_token``, and True without one: DeepSeek's models saw a bos before every text.

        Raises:
            ValueError: a missing or broken file, not a byte-level BPE, or no end-of-sentence id anywhere.
        """
        directory = Path(path)
        backend = _load_backend(directory / "tokenizer.json")
        tokenizer_config = _load_config(directory / "tokenizer_config.json")
        configs = [_load_config(directory / name) for name in ("generation_config.json", "config.json")]
        bos_token_ids = _find_ids("bos", configs, tokenizer_config, backend, directory)
        eos_token_ids = _find_ids("eos", configs, tokenizer_config, backend, directory)
        if not eos_token_ids:
            raise ValueError(
                f"no end-of-sentence token is named in {directory}; put eos_token_id into its generation_config.json "
                "or config.json, or eos_token into its tokenizer_config.json"
            )
        return cls(
            backend,
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            eos_token_ids=eos_token_ids,
            adds_bos=tokenizer_config.get("add_bos_token", True) is not False,
        )

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, nothing added; the strings of special tokens become those tokens.

        Raises:
            ValueError: not a string, or one with lone surrogates.
        """
        if not isinstance(text, str):
            raise ValueError(f"only text can be tokenized, got {type(text).__name__}; pass a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at character {error.start}, which is not Unicode text; remove it"
            ) from error
        if len(text) > _LONG_CHARS:  # of the two, only this lets other threads run meanwhile
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        else:
            encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def count_at_least(self, text: str) -> int:
        """A number of tokens that ``text`` cannot have fewer than, without tokenizing it; 0 where nothing is known."""
        return -(-len(text) // self._max_token_bytes) if self._max_token_bytes else 0

    def encode_mark(self, mark: str) -> int:
        """The one token of a mark such as ``</think>``.

        Raises:
            ValueError: this tokenizer writes it with several.
        """
        token_ids = self.encode(mark)
        if len(token_ids) != 1:
            raise ValueError(
                f"{mark} is {len(token_ids)} tokens of this tokenizer; a grammar can begin behind one only"
            )
        return token_ids[0]

    def encode_prompt(self, text: str) -> list[int]:
        """As ``encode``, for a plain prompt: begins with the bos token if ``adds_bos``, but never with two."""
        ids = self.encode(text)
        if self.adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id that the tokenizer does not know.
        """
        self.check_token_ids(token_ids)
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; those of one token need not be whole UTF-8 characters."""
        self.check_token_ids([token_id])
        return self._token_bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of the text by ``skip_special_tokens``."""
        self.check_token_ids([token_id])
        return token_id in self.special_token_ids

    def byte_table(self, *, skip_special_tokens: bool) -> Sequence[bytes]:
        """The bytes of every token by id, empty for special tokens if these are skipped. Shared: do not change it."""
        return self._shown_bytes if skip_special_tokens else self._token_bytes

    def vocabulary(self, eos_token_ids: tuple[int, ...] | None = None) -> Vocabulary:
        """What grammars are followed in; ``eos_token_ids``: None = the tokenizer's."""
        ends = self.eos_token_ids if eos_token_ids is None else eos_token_ids
        # The mark of tool calls is text here, whatever a tokenizer.json says of it: grammars of calls spell it.
        mark = DSML_TOKEN.encode()
        special = [each for each in sorted(self.special_token_ids) if self._token_bytes[each] != mark]
        return Vocabulary(self._token_bytes, special, ends, self.encode)

    def check_token_ids(self, token_ids: Sequence[object], name: str = "token_ids") -> None:
        """Raises ValueError, naming the first that is bad, unless every id is an integer in [0, vocab_size)."""
        size = self.vocab_size
        for position, token_id in enumerate(token_ids):
            if type(token_id) is not int or not 0 <= token_id < size:
                raise ValueError(
                    f"{name}[{position}] must be an integer in [0, {size}), the tokenizer's ids, got {token_id!r}"
                )

    def check_matches(self, vocab_size: int) -> None:
        """Raises ValueError if the tokenizer has ids for which a model of this ``vocab_size`` has no embedding."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} entries, but the model's vocab_size is {vocab_size}; "
                "set --tokenizer to the directory of the model's own tokenizer"
            )


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; set --tokenizer to a directory with a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(
            f"{path} is not a readable tokenizer: {error}; copy it again from the model's source"
        ) from error


def _load_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; copy it again from the model's source") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _find_ids(
    name: str,
    configs: list[dict[str, object]],
    tokenizer_config: dict[str, object],
    backend: tokenizers.Tokenizer,
    directory: Path,
) -> tuple[int, ...]:
    """The ids of the ``bos`` or ``eos`` token; () if no file names one."""
    for config in configs:
        value = config.get(f"{name}_token_id")
        ids = value if isinstance(value, list) else [value]
        if value is not None and ids:
            if not all(type(token_id) is int for token_id in ids):
                raise ValueError(f"{name}_token_id in {directory} must be an integer or a list of them, got {value!r}")
            return tuple(ids)
    token = tokenizer_config.get(f"{name}_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return ()
    token_id = backend.token_to_id(content) if isinstance(content, str) else None
    if token_id is None:
        raise ValueError(
            f"{name}_token {content!r} of {directory / 'tokenizer_config.json'} is not a token of its tokenizer.json"
        )
    return (token_id,)


def _build_token_bytes(backend: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of every id, computed as the library's ByteLevel decoder does; b"" for an id without a token."""
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    characters = {code: _NOT_A_BYTE for code in range(_MAX_BYTE + 1)}
    characters.update((ord(character), byte) for byte, character in enumerate(_byte_characters()))
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        try:
            table[token_id] = token.translate(characters).encode("latin-1")
        except UnicodeEncodeError:
            table[token_id] = token.encode()  # an added token, not written in the byte alphabet: its own text
    return table


def _keeps_every_byte(backend: tokenizers.Tokenizer) -> bool:
    """Whether every byte of a text is in one of its tokens: nothing is normalised away, cut out or swallowed."""
    has_all_bytes = all(backend.token_to_id(character) is not None for character in _byte_characters())
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    parts = (backend.normalizer, backend.pre_tokenizer)
    normalizer, splitter = ("" if part is None else part.__getstate__().decode() for part in parts)
    splits_only = set(re.findall(r'"type":"(\w+)"', splitter)) <= _KEEPING_SPLITTERS and '"Removed"' not in splitter
    return has_all_bytes and not swallows and normalizer in _NO_NORMALIZER and splits_only


def _byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself if printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters = []
    num_moved = 0
    for byte in range(_MAX_BYTE + 1):
        characters.append(chr(byte if byte in printable else 0x100 + num_moved))
        num_moved += byte not in printable
    return characters
