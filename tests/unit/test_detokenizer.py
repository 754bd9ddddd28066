"""Streamed text equals decoded text, never shows half a character, and ends exactly at a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.engine.detokenizer import IncrementalDetokenizer, StopMatcher
from argosy.engine.tokenizer import Tokenizer
from tests.helpers.tiny_tokenizer import build_tiny_backend

TINY = Tokenizer(build_tiny_backend(), bos_token_id=0, eos_token_ids=(1,), adds_bos=True)
chunked_ids = st.lists(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=4), max_size=12)


@settings(max_examples=300, deadline=None)
@given(chunked_ids, st.booleans())
def test_text_in_pieces_equals_the_whole_decoded(chunks, skip_special_tokens):
    detokenizer = IncrementalDetokenizer(TINY, skip_special_tokens=skip_special_tokens)
    pieces = [detokenizer.append(chunk) for chunk in chunks] + [detokenizer.finish()]
    ids = sum(chunks, [])
    assert "".join(pieces) == TINY.decode(ids, skip_special_tokens)
    assert detokenizer.num_tokens == len(ids) and detokenizer.stop_reason is None


@settings(max_examples=200, deadline=None)
@given(st.text("a巴黎😀é#", max_size=12))
def test_half_a_character_is_never_shown(text):
    detokenizer = IncrementalDetokenizer(TINY, stop=["##"])
    shown = ""
    for token_id in TINY.encode(text.replace("#", "")):
        shown += detokenizer.append([token_id])
        assert text.replace("#", "").startswith(shown)
    assert shown == text.replace("#", "")


def test_an_emoji_split_over_tokens_appears_when_it_is_complete():
    ids = TINY.encode("😀")
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(TINY)
    assert [detokenizer.append([token_id]) for token_id in ids] == ["", "", "", "😀"]
    assert detokenizer.finish() == ""


def test_half_a_character_at_the_end_becomes_a_replacement_character():
    detokenizer = IncrementalDetokenizer(TINY)
    ids = TINY.encode("a😀")[:-1]
    assert detokenizer.append(ids) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert TINY.decode(ids) == "a\ufffd"


# --- stop strings, against a slow twin ----------------------------------------


def slow_stop(text, stops, min_chars):
    """(end of the text, the stop string that ends there) for the first completed one; ties go to the longest."""
    for end in range(min_chars, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def slow_held(text, stops):
    """Characters at the end of ``text`` that may still begin a stop string."""
    return max((k for stop in stops for k in range(1, len(stop) + 1) if text.endswith(stop[:k])), default=0)


short_texts = st.text("ab黎", max_size=14)
stop_lists = st.lists(st.text("ab黎", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(short_texts, stop_lists, st.booleans(), st.integers(0, 6))
def test_stop_strings_end_the_text_where_a_plain_search_says(text, stops, include_stop, min_tokens):
    ids = [token_id for character in text for token_id in TINY.encode(character)]
    num_tokens_at = [len(TINY.encode(character)) for character in text]
    min_chars = next((n for n in range(1, len(text) + 1) if sum(num_tokens_at[:n]) >= min_tokens), len(text) + 1)
    expected = slow_stop(text, stops, min_chars)
    detokenizer = IncrementalDetokenizer(TINY, stops, include_stop, min_tokens=min_tokens)
    shown = ""
    for number, token_id in enumerate(ids, start=1):
        shown += detokenizer.append([token_id])
        if detokenizer.stop_reason is not None:
            break
        whole = TINY.decode(ids[:number]).rstrip("\ufffd")
        assert shown == whole[: len(whole) - slow_held(whole, stops)]
    shown += detokenizer.finish()
    if expected is None:
        assert (shown, detokenizer.stop_reason, detokenizer.num_tokens) == (text, None, len(ids))
    else:
        end, stop = expected
        assert detokenizer.stop_reason == stop
        assert shown == text[: end if include_stop else end - len(stop)]
        assert detokenizer.num_tokens == sum(num_tokens_at[:end])


@settings(max_examples=200, deadline=None)
@given(short_texts, stop_lists, st.lists(st.integers(1, 5), max_size=20))
def test_how_tokens_arrive_changes_nothing(text, stops, sizes):
    ids = [token_id for character in text for token_id in TINY.encode(character)]
    one_by_one, in_chunks = IncrementalDetokenizer(TINY, stops), IncrementalDetokenizer(TINY, StopMatcher(stops))
    texts = ["".join(map(one_by_one.append, ([token_id] for token_id in ids))), ""]
    rest = ids
    for size in [*sizes, len(ids)]:
        texts[1] += in_chunks.append(rest[:size])
        rest = rest[size:]
    facts = [
        (text + each.finish(), each.stop_reason, each.num_tokens)
        for text, each in zip(texts, (one_by_one, in_chunks), strict=True)
    ]
    assert facts[0] == facts[1]


def test_a_stop_string_may_span_tokens_and_leave_text_behind_it():
    ids = TINY.encode("The answer is 42. Stop here")
    detokenizer = IncrementalDetokenizer(TINY, stop=["wer is", "ver"])
    shown = [detokenizer.append([token_id]) for token_id in ids]
    assert "".join(shown) == "The ans"
    assert detokenizer.stop_reason == "wer is"
    assert TINY.decode(ids[: detokenizer.num_tokens]).startswith("The answer is")
    assert not TINY.decode(ids[: detokenizer.num_tokens - 1]).endswith("wer is")
    assert detokenizer.append(ids) == "" and detokenizer.finish() == ""


def test_what_was_held_back_for_a_stop_string_is_shown_at_the_end():
    detokenizer = IncrementalDetokenizer(TINY, stop=["####"])
    assert detokenizer.append(TINY.encode("42 ##")) == "42 "
    assert detokenizer.append(TINY.encode("x#")) == "##x"
    assert detokenizer.finish() == "#"


def test_skipped_special_tokens_neither_show_nor_break_a_stop_string():
    ids = [*TINY.encode("Pa"), 1, *TINY.encode("ris")]
    detokenizer = IncrementalDetokenizer(TINY, stop=["Paris"])
    assert detokenizer.append(ids) == "" and detokenizer.stop_reason == "Paris"
    shown = IncrementalDetokenizer(TINY, stop=["Paris"], skip_special_tokens=False)
    assert shown.append(ids) + shown.finish() == TINY.decode(ids, skip_special_tokens=False)
    assert shown.stop_reason is None


@pytest.mark.parametrize("token_id", [-1, TINY.vocab_size])
def test_an_id_from_the_padded_vocabulary_is_our_mistake(token_id):
    with pytest.raises(AssertionError, match="sampled from padding"):
        IncrementalDetokenizer(TINY).append([token_id])
