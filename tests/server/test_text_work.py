"""Long texts do not hold up the event loop, are refused by their length where that suffices, and wait in bounds."""

import asyncio
import threading
import time

import pytest
import tokenizers

from argosy.engine.prompts import PromptChecker
from argosy.engine.tokenizer import Tokenizer
from argosy.sampling_params import SamplingParams
from argosy.server.errors import ApiError
from argosy.server.text_work import MAX_LOOP_SIZE, MAX_WAITING, TextWork
from tests.helpers.tiny_tokenizer import build_tiny_backend

LONG = "the answer is 42 and 中国 " * 12_000


def test_long_work_runs_in_threads_of_which_there_are_few() -> None:
    seen: set[str] = set()

    def work() -> None:
        seen.add(threading.current_thread().name)
        time.sleep(0.01)

    async def go() -> None:
        texts = TextWork()
        await asyncio.gather(*(texts.run(MAX_LOOP_SIZE + 1, work) for _ in range(10)))
        assert len(seen) == 2 and threading.current_thread().name not in seen
        seen.clear()
        await texts.run(MAX_LOOP_SIZE, work)
        assert seen == {threading.current_thread().name}

    asyncio.run(go())


def test_the_loop_runs_on_while_a_long_text_is_tokenized(tokenizer) -> None:
    """Its longest pause is well below the whole work; it is all of it if the tokenizer keeps Python's lock."""

    async def go() -> tuple[float, float]:
        work = asyncio.create_task(TextWork().run(len(LONG), lambda: tokenizer.encode(LONG)))
        start_s = last_s = time.perf_counter()
        longest_s = 0.0
        while not work.done():
            await asyncio.sleep(0)
            now_s = time.perf_counter()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
        return longest_s, last_s - start_s

    pauses = [longest_s / all_s for longest_s, all_s in (asyncio.run(go()) for _ in range(3))]
    assert min(pauses) < 0.6


def test_only_so_many_long_texts_wait() -> None:
    release = threading.Event()

    async def go() -> None:
        texts = TextWork()
        waiting = [asyncio.create_task(texts.run(10**6, release.wait)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await texts.run(10**6, release.wait)
        assert refused.value.status == 503 and refused.value.retry_after_s
        release.set()
        await asyncio.gather(*waiting)
        assert await texts.run(10**6, lambda: 5) == 5

    asyncio.run(go())


@pytest.mark.parametrize("n", [1, 2])
def test_overload_is_told_before_a_text_is_tokenized(stand, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """For one completion nothing is taken; where one would be, but not two, the fields say so."""
    stand.service.max_num_running = n - 1
    object.__setattr__(stand.service.settings, "max_num_queued_reqs", 0)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("tokenized"))

    async def go() -> list[int]:
        async with stand.client() as client:
            bodies = {
                "/v1/completions": {"prompt": "a", "n": n},
                "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "n": n},
            }
            return [(await client.post(path, json=body)).status_code for path, body in bodies.items()]

    assert asyncio.run(go()) == [503, 503]


def test_texts_too_long_for_any_tokens_are_not_tokenized(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = PromptChecker(tokenizer, 100)
    longest = max(map(len, tokenizer.byte_table(skip_special_tokens=False)))
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("tokenized"))
    with pytest.raises(ValueError, match="at least 100 tokens, but max_model_len is 100"):
        checker.check("a" * (99 * longest + 1), SamplingParams())


@pytest.mark.parametrize("text", ["", "a", "<｜begin▁of▁sentence｜>" * 5, "中国" * 3000, " " * 5000, LONG[:3000]])
def test_no_text_has_fewer_tokens_than_its_length_says(tokenizer, text: str) -> None:
    assert tokenizer.count_at_least(text) <= len(tokenizer.encode(text))


def test_long_texts_have_the_tokens_of_short_ones(tokenizer) -> None:
    whole = tokenizer.encode(LONG[:2000])
    assert whole == tokenizer._backend.encode(LONG[:2000], add_special_tokens=False).ids


@pytest.mark.parametrize("change", ["normalizer", "swallows", "cuts"])
def test_a_tokenizer_that_drops_text_has_no_such_bound(change: str) -> None:
    backend = build_tiny_backend()
    kept = Tokenizer(backend, bos_token_id=0, eos_token_ids=(1,), adds_bos=True)
    assert kept.count_at_least("a" * 1000) > 0
    if change == "normalizer":
        backend.normalizer = tokenizers.normalizers.NFC()
    elif change == "swallows":
        backend.add_tokens([tokenizers.AddedToken("<eats>", rstrip=True)])
    else:
        split = tokenizers.pre_tokenizers.Split("x", "removed")
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    assert Tokenizer(backend, bos_token_id=0, eos_token_ids=(1,), adds_bos=True).count_at_least("a" * 1000) == 0
