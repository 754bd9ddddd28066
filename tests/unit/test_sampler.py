"""Sampling: greedy, filtered and penalised draws against a slow twin, their statistics, seeds, masks and logprobs."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from argosy.messages import AdmittedRequest, TokenLogprobs
from argosy.runner import sampling_ops
from argosy.runner.random_stream import key_from_request, key_from_seed, uniforms
from argosy.runner.sampler import SampledTokens, Sampler
from argosy.sampling_params import SamplingParams

VOCAB_SIZE, NUM_VALID, NUM_ROWS, MAX_LEN = 64, 50, 512, 64
EOS = (1,)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@dataclass
class History:
    """The runner's tables, as the sampler sees them."""

    token_ids: np.ndarray = field(default_factory=lambda: np.zeros((NUM_ROWS, MAX_LEN), dtype=np.int32))
    num_tokens: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROWS, dtype=np.int32))
    num_prompt_tokens: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROWS, dtype=np.int32))
    lacks_last: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROWS, dtype=bool))

    @property
    def num_known_tokens(self) -> np.ndarray:
        return self.num_tokens - self.lacks_last

    def put(self, row: int, prompt: list[int], output: list[int]) -> None:
        tokens = [*prompt, *output]
        self.token_ids[row] = NUM_VALID - 1  # what a former request may have left behind
        self.token_ids[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.num_prompt_tokens[row] = len(prompt)


def build_sampler(
    device: str = "cpu", *, engine_seed: int = 0, vocab_size: int = VOCAB_SIZE, num_valid_tokens: int = NUM_VALID
) -> Sampler:
    return Sampler(
        vocab_size=vocab_size,
        num_valid_tokens=num_valid_tokens,
        max_num_seqs=NUM_ROWS,
        device=torch.device(device),
        engine_seed=engine_seed,
    )


def admit(sampler: Sampler, row: int, params: SamplingParams, request_id: str | None = None) -> None:
    request = AdmittedRequest(row, request_id or f"request-{row}", [], 0, 0, [], params)
    sampler.admit(row, request, EOS)


def read_logprobs(sampled: SampledTokens) -> list[TokenLogprobs | None]:
    assert sampled.logprobs is not None
    return sampled.logprobs.read(sampled.logprobs.ids.cpu(), sampled.logprobs.values.cpu())


def sample_one(params: SamplingParams, scores: list[float], *, output: list[int] | None = None, row: int = 3) -> int:
    """The token that one request gets from ``scores``, the rest of the vocabulary being far below."""
    sampler, history = build_sampler(), History()
    admit(sampler, row, params)
    history.put(row, [2], output or [])
    logits = torch.full((1, VOCAB_SIZE), -1000.0)
    logits[0, : len(scores)] = torch.tensor(scores)
    return int(sampler.sample(logits, np.array([row]), history).token_ids[0])


def draw_many(params: dict[str, float], logits: torch.Tensor, num_steps: int, *, device: str = "cpu") -> np.ndarray:
    """How often each token is drawn from one distribution, by all rows, each with its seed, ``num_steps`` times."""
    sampler, history = build_sampler(device), History()
    for row in range(NUM_ROWS):
        admit(sampler, row, SamplingParams(seed=row, **params))
    counts = np.zeros(NUM_VALID)
    rows = np.arange(NUM_ROWS)
    for step in range(num_steps):
        history.num_tokens[:] = step
        token_ids = sampler.sample(logits.to(device).expand(NUM_ROWS, -1), rows, history).token_ids
        counts += np.bincount(token_ids.cpu().numpy(), minlength=NUM_VALID)
    return counts


def check_chi_square(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Far looser than chance (6 standard deviations), far tighter than any wrong formula."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * counts.sum()
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 1e-9


# ---- the slow twin: one row, plain numpy in float64


def twin_scores(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    scores = logits[:NUM_VALID].astype(np.float64)
    for token_id, bias in (params.logit_bias or {}).items():
        scores[token_id] += bias
    if len(output) < params.min_tokens:
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
        scores[[token_id for token_id in stop_ids if token_id < NUM_VALID]] = -np.inf
    for token_id in range(NUM_VALID):
        if token_id in prompt or token_id in output:
            factor = params.repetition_penalty
            scores[token_id] = scores[token_id] / factor if scores[token_id] > 0 else scores[token_id] * factor
        scores[token_id] -= params.frequency_penalty * output.count(token_id)
        scores[token_id] -= params.presence_penalty * (token_id in output)
    return scores


def twin_probabilities(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    def normalise(weights: np.ndarray) -> np.ndarray:
        return weights / weights.sum()

    p = normalise(np.exp((scores - scores.max()) / params.temperature))
    p = normalise(np.where(p < params.min_p * p.max() * (1 - 1e-9), 0.0, p))
    best_first = sorted(range(len(p)), key=lambda token_id: (-p[token_id], token_id))
    if params.top_k > 0:
        p[best_first[params.top_k :]] = 0.0
        p = normalise(p)
    if params.top_p < 1.0:
        reached = 0.0
        for token_id in best_first:
            if reached >= params.top_p:
                p[token_id] = 0.0
            reached += p[token_id]
        p = normalise(p)
    return p


def twin_token(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> int | None:
    """None where rounding may decide: the random number falls on the edge between two tokens."""
    scores = twin_scores(logits, params, prompt, output)
    if params.is_greedy:
        return int(scores.argmax())
    assert params.seed is not None
    uniform = uniforms(np.array([key_from_seed(params.seed)], dtype=np.uint64), np.array([len(output)]))[0]
    reached = twin_probabilities(scores, params).cumsum()
    if np.abs(reached - uniform).min() < 1e-5:
        return None
    return int(np.argmax(reached > uniform))


def random_params(rng: np.random.Generator) -> SamplingParams:
    def sometimes(value: float, off: float) -> float:
        return value if rng.random() < 0.4 else off

    biased = rng.choice(NUM_VALID, size=3, replace=False)
    return SamplingParams(
        temperature=0.0 if rng.random() < 0.2 else float(rng.uniform(0.3, 2.0)),
        top_k=int(sometimes(int(rng.integers(1, 60)), -1)),
        top_p=sometimes(float(rng.uniform(0.1, 0.99)), 1.0),
        min_p=sometimes(float(rng.uniform(0.01, 0.5)), 0.0),
        presence_penalty=sometimes(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=sometimes(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=sometimes(float(rng.uniform(0.5, 2)), 1.0),
        logit_bias={int(i): float(rng.uniform(-5, 5)) for i in biased} if rng.random() < 0.4 else None,
        min_tokens=int(sometimes(4, 0)),
        stop_token_ids=(2, 3, NUM_VALID + 3) if rng.random() < 0.5 else (),
        ignore_eos=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**63)),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_last_on_device", [False, True])
def test_a_mixed_batch_draws_what_the_slow_twin_draws_row_by_row(
    device: str, dtype: torch.dtype, is_last_on_device: bool
) -> None:
    """``is_last_on_device``: where a row has output, the host does not know the last token of it."""
    rng = np.random.default_rng(5)
    sampler, history = build_sampler(device), History()
    last_token_ids = torch.zeros(NUM_ROWS, dtype=torch.int64)
    checked = 0
    for _ in range(8):
        rows = rng.permutation(NUM_ROWS)[:60]
        settings, texts = [], []
        for row in rows:
            params = random_params(rng)
            prompt = rng.integers(0, NUM_VALID, rng.integers(1, 12)).tolist()
            output = rng.integers(0, NUM_VALID, rng.integers(0, 12)).tolist()
            admit(sampler, row, params)
            history.put(row, prompt, output)
            history.lacks_last[row] = is_last_on_device and bool(output)
            if history.lacks_last[row]:
                last_token_ids[row] = output[-1]
                history.token_ids[row, len(prompt) + len(output) - 1] = NUM_VALID - 1
            settings.append(params)
            texts.append((prompt, output))
        logits = torch.from_numpy(rng.normal(0, 2, (len(rows), VOCAB_SIZE))).to(dtype)
        got = sampler.sample(logits.to(device), rows, history, last_token_ids.to(device)).token_ids.tolist()
        for line, (params, (prompt, output)) in enumerate(zip(settings, texts, strict=True)):
            expected = twin_token(logits[line].double().numpy(), params, prompt, output)
            if expected is not None:
                assert got[line] == expected, (params, prompt, output)
                checked += 1
    assert checked > 450


# ---- greedy


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_best_valid_token_and_the_lowest_id_of_ties(device: str, dtype: torch.dtype) -> None:
    sampler = build_sampler(device)
    for row in range(3):
        admit(sampler, row, SamplingParams(temperature=0.0))
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, NUM_VALID:] = 1000.0  # padding
    logits[1, [7, 30, 49]] = 2.0
    logits[2, 49] = 1.0
    sampled = sampler.sample(logits.to(device, dtype), np.arange(3), History())
    assert sampled.token_ids.tolist() == [0, 7, 49]
    assert sampled.token_ids.dtype == torch.int64
    assert sampled.logprobs is None


class OpRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_greedy_batch_is_only_cut_and_compared(dtype: torch.dtype) -> None:
    sampler = build_sampler()
    for row in range(4):
        admit(sampler, row, SamplingParams(temperature=0.0, top_p=0.5, top_k=3, min_p=0.1, seed=1))
    logits = torch.randn(4, VOCAB_SIZE, dtype=dtype)
    with OpRecorder() as recorder:
        sampler.sample(logits, np.arange(4), History())
    assert recorder.names <= {"slice", "argmax", "alias", "detach", "lift_fresh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_no_tokens(dtype: torch.dtype) -> None:
    sampler = build_sampler()
    admit(sampler, 0, SamplingParams(logprobs=1))
    sampled = sampler.sample(torch.zeros(0, VOCAB_SIZE, dtype=dtype), np.zeros(0, dtype=np.int64), History())
    assert sampled.token_ids.shape == (0,)
    assert sampled.token_ids.dtype == torch.int64
    assert sampled.logprobs is None


def test_logits_are_left_as_they_were() -> None:
    sampler, history = build_sampler(), History()
    params = {"min_tokens": 3, "presence_penalty": 1.0, "logit_bias": {4: 3.0}, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    for row, temperature in enumerate((0.0, 1.0)):
        admit(sampler, row, SamplingParams(temperature=temperature, **params))
        history.put(row, [5], [6])
    logits = torch.randn(2, VOCAB_SIZE)
    before = logits.clone()
    sampler.sample(logits, np.arange(2), history)
    assert torch.equal(logits, before)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 65 entries, but the model's vocab_size is 64"):
        build_sampler(num_valid_tokens=VOCAB_SIZE + 1)


# ---- draws


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params: dict[str, float], device: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCAB_SIZE) * 1.5
    logits[NUM_VALID:] = 50.0
    settings = SamplingParams(**params)
    probabilities = twin_probabilities(twin_scores(logits.numpy(), settings, [], []), settings)
    check_chi_square(draw_many(params, logits, num_steps=40, device=device), probabilities)


def test_draws_over_the_full_vocabulary_are_not_skewed_by_summation() -> None:
    vocab_size, num_buckets = 129_280, 16
    sampler, history = build_sampler(vocab_size=vocab_size, num_valid_tokens=vocab_size), History()
    counts = np.zeros(num_buckets)
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    for row in range(NUM_ROWS):
        admit(sampler, row, SamplingParams(seed=row))
    for start in range(0, NUM_ROWS, 64):
        rows = np.arange(start, start + 64)
        token_ids = sampler.sample(logits.expand(64, -1), rows, history).token_ids.numpy()
        counts += np.bincount(token_ids * num_buckets // vocab_size, minlength=num_buckets)
    check_chi_square(counts, logits.double().softmax(0).view(num_buckets, -1).sum(1).numpy())


@pytest.mark.parametrize("device", DEVICES)
def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_ties(device: str) -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[20] = 1.0
    counts = draw_many({"top_k": 4}, logits, num_steps=4, device=device)
    assert np.flatnonzero(counts).tolist() == [0, 1, 2, 20]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, [3]), (0.51, [3, 7]), (0.75, [3, 7]), (0.76, [3, 7, 9]), (1.0, None)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int] | None, device: str) -> None:
    logits = torch.full((VOCAB_SIZE,), -5.0)
    logits[[3, 7, 9, 11]] = torch.tensor([4.0, 2.0, 1.0, 1.0]).log() + 20.0
    if kept is None:
        logits[:] = 0.0
        kept = list(range(NUM_VALID))
    counts = draw_many({"top_p": top_p}, logits, num_steps=4, device=device)
    assert np.flatnonzero(counts).tolist() == kept


def test_top_p_stops_at_a_token_that_reaches_it_exactly() -> None:
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[[3, 7]] = 0.0
    assert np.flatnonzero(draw_many({"top_p": 0.5}, logits, num_steps=4)).tolist() == [3]


@pytest.mark.parametrize("device", DEVICES)
def test_a_draw_is_the_inverse_of_the_exact_cumulative_distribution(device: str) -> None:
    vocab_size = 129_280
    scores = torch.full((4, vocab_size), -17.0)
    scores[:, 0] = 0.0  # mass 1, and then 129,279 tokens of 4e-8, which a float32 sum cannot tell apart
    uniform = torch.tensor([[0.9955], [0.9966], [0.9977], [0.9988]], dtype=torch.float64)
    reached = scores[0].exp().double().numpy().cumsum()
    expected = np.searchsorted(reached, uniform[:, 0].numpy() * reached[-1])
    assert sampling_ops.draw(scores.to(device), uniform.to(device)).tolist() == expected.tolist()


def test_min_p_of_one_keeps_the_likeliest_only() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[[5, 6]] = 0.01
    assert np.flatnonzero(draw_many({"min_p": 1.0}, logits, num_steps=4)).tolist() == [5, 6]


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-300, 5e-324])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    assert sample_one(SamplingParams(temperature=temperature, seed=1), [1.0, 5.0, 3.0]) == 1


def test_great_temperatures_are_uniform() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    check_chi_square(draw_many({"temperature": 100.0}, logits / 10, 40), np.full(NUM_VALID, 1 / NUM_VALID))


# ---- seeds


def draw_sequence(
    rows: list[int], *, seed: int | None, position: int, batch: int = 1, engine_seed: int = 0, request_id: str = "r"
) -> list[int]:
    """Tokens of one request: at step i it is in row rows[i], and it is line ``position`` of ``batch`` lines."""
    sampler, history = build_sampler(engine_seed=engine_seed), History()
    generator = torch.Generator().manual_seed(9)
    others = torch.Generator().manual_seed(sum(rows))
    tokens: list[int] = []
    for step, row in enumerate(rows):
        lines = np.array([*range(100, 100 + position), row, *range(200, 199 + batch - position)])
        if step == 0:
            for line, other in enumerate(lines):
                admit(sampler, other, SamplingParams(temperature=0.5 + line, seed=line if line % 2 else None))
        if step == 0 or row != rows[step - 1]:  # it was preempted, and starts again in another row
            admit(sampler, row, SamplingParams(seed=seed), request_id)
        scores = torch.randn(VOCAB_SIZE, generator=generator)
        history.put(row, [3, 4], tokens)
        logits = torch.randn(batch, VOCAB_SIZE, generator=others)
        logits[position] = scores
        tokens.append(int(sampler.sample(logits, lines, history).token_ids[position]))
    return tokens


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, None])
def test_a_request_draws_the_same_wherever_it_sits_and_after_preemption(seed: int | None) -> None:
    alone = draw_sequence([0] * 30, seed=seed, position=0)
    assert len(set(alone)) > 10
    assert draw_sequence([17] * 30, seed=seed, position=5, batch=9) == alone
    assert draw_sequence([1] * 10 + [44] * 20, seed=seed, position=2, batch=3) == alone


def test_seeds_differ_from_each_other_and_the_engine_seed_does_not_matter_to_them() -> None:
    one = draw_sequence([0] * 30, seed=1, position=0)
    assert draw_sequence([0] * 30, seed=1, position=0, engine_seed=7, request_id="other") == one
    assert draw_sequence([0] * 30, seed=2, position=0) != one


def test_requests_without_a_seed_follow_engine_seed_and_request_id() -> None:
    one = draw_sequence([0] * 30, seed=None, position=0)
    assert draw_sequence([0] * 30, seed=None, position=0, engine_seed=1) != one
    assert draw_sequence([0] * 30, seed=None, position=0, request_id="s") != one


def test_a_long_batch_is_filtered_in_chunks_without_a_trace() -> None:
    vocab_size, num_lines = 129_280, 70  # 64 such lines are filtered at once
    sampler, history = build_sampler(vocab_size=vocab_size, num_valid_tokens=vocab_size), History()
    logits = torch.randn(num_lines, vocab_size, generator=torch.Generator().manual_seed(3))
    for row in range(num_lines):
        admit(sampler, row, SamplingParams(seed=row))
    together = sampler.sample(logits, np.arange(num_lines), history).token_ids.tolist()
    for line in (0, 63, 64, 69):
        assert sampler.sample(logits[line : line + 1], np.array([line]), history).token_ids.tolist() == [together[line]]
    assert len(set(together)) > 60


def test_the_random_stream_is_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of seed 1234567
    numbers = uniforms(np.full(4, 1234567, dtype=np.uint64), np.arange(4))
    assert numbers.tolist() == [((value >> 12) + 0.5) / 2**52 for value in published]
    wrapped = uniforms(np.array([2**64 - 1], dtype=np.uint64), np.array([2**31 - 1], dtype=np.int32))
    assert 0.0 < wrapped[0] < 1.0


def test_keys_are_frozen() -> None:
    """A change here changes every user's seeded output."""
    assert key_from_seed(0) == 16294208416658607535
    assert key_from_request(0, "request-0") == 4754841774050295665


@pytest.mark.parametrize("across", ["seeds", "positions"])
def test_the_random_stream_is_uniform_along_seeds_and_positions(across: str) -> None:
    steps = np.arange(40_000)
    if across == "seeds":
        numbers = uniforms(
            np.array([key_from_seed(i) for i in range(len(steps))], dtype=np.uint64), np.zeros_like(steps)
        )
    else:
        numbers = uniforms(np.full(len(steps), key_from_seed(3), dtype=np.uint64), steps)
    check_chi_square(np.histogram(numbers, bins=100, range=(0, 1))[0].astype(float), np.full(100, 0.01))
    pairs = np.histogram2d(numbers[:-1], numbers[1:], bins=10, range=((0, 1), (0, 1)))[0]
    check_chi_square(pairs.ravel(), np.full(100, 0.01))


# ---- masks, bias, penalties


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize(("num_output", "expected"), [(0, 3), (1, 3), (2, 1), (3, 1)])
def test_min_tokens_masks_end_and_stop_tokens_until_reached(temperature: float, num_output: int, expected: int) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(2, NUM_VALID + 1), seed=0)
    assert sample_one(params, [0.0, 9.0, 8.0, 7.0], output=[5] * num_output) == expected


def test_min_tokens_leaves_end_of_sequence_alone_when_it_does_not_stop() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(2,), ignore_eos=True)
    assert sample_one(params, [0.0, 8.0, 9.0, 7.0]) == 1


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"presence_penalty": 1.5}, 6),  # once, however often token 5 came
        ({"frequency_penalty": 0.6}, 6),  # 3 x 0.6
        ({"frequency_penalty": 0.3}, 5),  # 3 x 0.3
        ({"presence_penalty": 0.9}, 5),
        ({"repetition_penalty": 1.5}, 6),
        ({"repetition_penalty": 1.1}, 5),
        ({"logit_bias": {6: 1.5}}, 6),
        ({"logit_bias": {6: 0.5}}, 5),
    ],
    ids=str,
)
def test_penalties_and_bias_move_a_token_by_what_they_say(params: dict[str, float], expected: int) -> None:
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, 3.5, 2.5]
    assert sample_one(SamplingParams(temperature=0.0, **params), scores, output=[5, 5, 5]) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_smallest_repetition_penalty_takes_a_seen_token_and_makes_no_nan(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=5e-324, seed=0)
    assert sample_one(params, [9.0, 9.0, 1.0, 9.0], output=[0]) == 0


def test_only_repetition_counts_the_prompt() -> None:
    scores = [0.0, 0.0, 2.5, 2.0]  # token 2 is the prompt
    for params, expected in (
        ({"presence_penalty": 2.0}, 2),
        ({"frequency_penalty": 2.0}, 2),
        ({"repetition_penalty": 2.0}, 3),
    ):
        assert sample_one(SamplingParams(temperature=0.0, **params), scores) == expected


def test_a_row_forgets_the_settings_of_its_last_request() -> None:
    sampler, history = build_sampler(), History()
    history.put(0, [5], [6])
    strong = SamplingParams(
        logit_bias={9: 100.0}, min_tokens=5, stop_token_ids=(3,), presence_penalty=2.0, logprobs=2, top_k=2, min_p=0.9
    )
    admit(sampler, 0, strong)
    admit(sampler, 0, SamplingParams(temperature=0.0))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [3, 6]] = torch.tensor([1.0, 1.5])
    sampled = sampler.sample(logits, np.array([0]), history)
    assert sampled.token_ids.tolist() == [6]
    assert sampled.logprobs is None


def test_an_unchecked_bias_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="logit_bias of request-0 is unchecked"):
        admit(build_sampler(), 0, SamplingParams(logit_bias={NUM_VALID: 1.0}))


# ---- logprobs


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_are_of_the_models_own_distribution_over_valid_tokens(device: str) -> None:
    torch.manual_seed(4)
    logits = torch.randn(4, VOCAB_SIZE)
    logits[:, NUM_VALID:] = 30.0
    logits[:, 8] = logits[:, 9] = 2.5
    sampler, history = build_sampler(device), History()
    settings = [
        SamplingParams(temperature=0.0, logprobs=5),
        SamplingParams(temperature=2.0, logprobs=3, seed=1, logit_bias={7: 90.0}, presence_penalty=1.0, top_k=1),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.0, logprobs=0, logit_bias={0: 90.0}),
    ]
    for row, params in enumerate(settings):
        admit(sampler, row, params)
        history.put(row, [1], [9])
    sampled = sampler.sample(logits.to(device), np.arange(4), history)
    logprobs = read_logprobs(sampled)
    assert sampled.token_ids[[1, 3]].tolist() == [7, 0]
    assert logprobs[2] is None
    reference = logits[:, :NUM_VALID].double().log_softmax(1)
    for line in (0, 1, 3):
        entry, num = logprobs[line], settings[line].logprobs
        assert entry is not None and num is not None
        ranked = sorted(range(NUM_VALID), key=lambda token_id: (-float(logits[line, token_id]), token_id))  # noqa: B023
        assert entry.token_id == int(sampled.token_ids[line])
        assert entry.rank == ranked.index(entry.token_id) + 1
        assert entry.logprob == pytest.approx(float(reference[line, entry.token_id]), abs=1e-5)
        assert entry.top_token_ids == ranked[:num]
        assert entry.top_logprobs == pytest.approx(reference[line, ranked[:num]].tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    sampler = build_sampler(vocab_size=8, num_valid_tokens=5)
    admit(sampler, 0, SamplingParams(temperature=0.0, logprobs=20))
    sampled = sampler.sample(torch.arange(8.0)[None], np.array([0]), History())
    (entry,) = read_logprobs(sampled)
    assert entry is not None and entry.top_token_ids == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_rank_by_id_with_either_sign_of_zero(device: str) -> None:
    scores = torch.tensor([[-0.0, -3.0, 0.0, -0.0, -7.0, -torch.inf, 5.0]], device=device)
    assert sampling_ops.rank_tokens(scores, 7).tolist() == [[6, 0, 2, 3, 1, 4, 5]]
    assert sampling_ops.rank_tokens(scores, 3).tolist() == [[6, 0, 2]]
    assert sampling_ops.rank_of(scores.expand(3, -1), torch.tensor([6, 3, 5], device=device)).tolist() == [1, 4, 7]
