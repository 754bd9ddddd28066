"""Decode steps from recordings on several ranks: the tokens of eager steps, whoever is idle, prefills or has more to do.

On a CPU a recording runs again, with its collectives; on cards (``-m cuda``, two of them) it is a device graph.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.engine.generation import Result
from argosy.engine.replica_messages import RankStats

NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS: dict[str, object] = {"dtype": "float32", "num_threads": 1, "max_model_len": 256, "max_num_seqs": 8}
TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA cards")


@dataclasses.dataclass(frozen=True)
class Deployment:
    device: str
    dp_size: int
    tp_size: int

    def start(self) -> LLM:
        is_emulated = self.device == "cpu"
        sizes = {"dp_size": self.dp_size, "tp_size": self.tp_size}
        return LLM(device=self.device, emulate_graphs=is_emulated, **sizes, **SETTINGS)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.device}-dp{self.dp_size}-tp{self.tp_size}"


DEPLOYMENTS = [
    *(Deployment("cpu", *sizes) for sizes in ((1, 2), (2, 1), (2, 2))),
    *(pytest.param(Deployment("cuda", *sizes), marks=[pytest.mark.cuda, TWO_CARDS]) for sizes in ((1, 2), (2, 1))),
]


@pytest.fixture(scope="module", params=DEPLOYMENTS, ids=str)
def deployment(request: pytest.FixtureRequest) -> Deployment:
    assert isinstance(request.param, Deployment)
    return request.param


@pytest.fixture(scope="module")
def llm(deployment: Deployment) -> Iterator[LLM]:
    with deployment.start() as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(deployment: Deployment) -> list[list[int]]:
    """One rank's tokens, eagerly."""
    with LLM(device=deployment.device, enforce_eager=True, **SETTINGS) as one_rank:  # type: ignore[arg-type]
        return tokens(one_rank.generate(prompts(), GREEDY))


def prompts(lengths: tuple[int, ...] = (1, 5, 63, 64, 130)) -> list[list[int]]:
    """On both sides of index_topk (64), which is a recording's length, and of a block (64)."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in lengths]


def tokens(results: list[Result]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in results if isinstance(output, RequestOutput)]


def ranks_of(llm: LLM) -> list[RankStats]:
    return [rank for replica in llm.collect_stats() for rank in replica.ranks]


class Counted:
    """What the ranks count in a block: ``replays`` by rank, ``sent`` by rank, axis and operation."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.replays: list[int] = []
        self.sent: list[dict[str, Counter[str]]] = []

    def __enter__(self) -> "Counted":
        self._before = ranks_of(self._llm)
        return self

    def __exit__(self, *exception: object) -> None:
        after = ranks_of(self._llm)
        self.replays = [b.num_replays - a.num_replays for a, b in zip(self._before, after, strict=True)]
        self.sent = [
            {axis: Counter(b.bytes_sent[axis]) - Counter(a.bytes_sent[axis]) for axis in ("tp", "ep")}
            for a, b in zip(self._before, after, strict=True)
        ]


@pytest.mark.parametrize("is_async", [False, True], ids=["waiting", "async"])
@pytest.mark.parametrize("data_parallel_rank", [None, 0], ids=["balanced", "one-replica"])
def test_tokens_are_those_of_one_rank(
    llm: LLM, alone: list[list[int]], data_parallel_rank: int | None, is_async: bool
) -> None:
    """On one replica, five requests are padded to eight, other slices of them, and the others replay with nothing to do;
    shared by two, batches differ."""
    llm.update_settings(async_scheduling=is_async)
    with Counted(llm) as counted:
        assert tokens(llm.generate(prompts(), GREEDY, data_parallel_rank=data_parallel_rank)) == alone
    assert counted.replays == [NUM_TOKENS - 1] * llm.config.world_size
    llm.update_settings(async_scheduling=False)


def test_replicas_that_prefill_end_and_fall_idle_at_different_times(llm: LLM) -> None:
    """More requests than rows, chunked prefills, ends of every kind: steps are replayed and eager by turns."""
    params = [
        dataclasses.replace(GREEDY, max_tokens=1 + 3 * i, ignore_eos=False, stop_token_ids=tuple(range(0, 3000, 7)))
        for i in range(9)
    ]
    params.append(SamplingParams(temperature=0.8, seed=3, max_tokens=25, repetition_penalty=1.4, logprobs=2))
    lengths = (130, 5, 90, 1, 64, 63, 7, 100, 2, 65)
    shares = (None, llm.config.dp_size - 1)[: llm.config.dp_size]  # one replica has nothing to share out
    llm.update_settings(max_num_batched_tokens=48, enforce_eager=True)
    expected = [tokens(llm.generate(prompts(lengths), params, data_parallel_rank=rank)) for rank in shares]
    for is_async in (False, True):
        llm.update_settings(enforce_eager=False, async_scheduling=is_async)
        with Counted(llm) as counted:
            for rank, each in zip(shares, expected, strict=True):
                assert tokens(llm.generate(prompts(lengths), params, data_parallel_rank=rank)) == each, is_async
        assert len(set(counted.replays)) == 1 and counted.replays[0] >= 12 * len(shares), is_async
    llm.update_settings(max_num_batched_tokens=2048, async_scheduling=False)


def test_replayed_collectives_are_counted_as_eager_ones(llm: LLM) -> None:
    """Four requests a replica, which is a recorded size: nothing is padded, so the same bytes travel."""
    equal = [[5 + i, 6, 7] for i in range(4 * llm.config.dp_size)]
    sent = []
    for is_eager in (True, False):
        llm.update_settings(ep_mode="low_latency", enforce_eager=is_eager)
        with Counted(llm) as counted:
            llm.generate(equal, GREEDY)
        assert counted.replays == [0 if is_eager else NUM_TOKENS - 1] * llm.config.world_size
        sent.append(counted.sent)
    assert sent[0] == sent[1] and all(rank["ep"]["all_to_all"] > 0 for rank in sent[0])
    assert all(rank["tp"]["reduce_scatter"] > 0 for rank in sent[0]) is (llm.config.tp_size > 1)
    llm.update_settings(ep_mode="auto")


@pytest.mark.parametrize("ep_mode", ["high_throughput", "all_gather"])
def test_what_was_recorded_for_another_exchange_is_not_replayed(
    llm: LLM, alone: list[list[int]], ep_mode: str
) -> None:
    llm.update_settings(ep_mode=ep_mode)  # type: ignore[arg-type]
    with Counted(llm) as counted:
        assert tokens(llm.generate(prompts(), GREEDY)) == alone
    assert not any(counted.replays)
    llm.update_settings(ep_mode="auto")


def test_a_batch_beyond_the_recorded_sizes_is_eager(deployment: Deployment) -> None:
    """Low latency to two tokens a rank: as many are recorded, one more is padded to twice as many."""
    with LLM(  # type: ignore[arg-type]
        device=deployment.device,
        emulate_graphs=deployment.device == "cpu",
        dp_size=deployment.dp_size,
        tp_size=deployment.tp_size,
        ll_max_tokens_per_rank=2,
        **SETTINGS,
    ) as llm:
        most = 2 * deployment.tp_size
        for count, num_replays in ((most, NUM_TOKENS - 1), (most + 1, 0)):
            with Counted(llm) as counted:
                llm.generate([[5 + i, 6, 7] for i in range(count)], GREEDY, data_parallel_rank=0)
            assert counted.replays == [num_replays] * llm.config.world_size


def test_replaying_what_was_never_recorded_is_refused() -> None:
    with LLM(tp_size=2, device="cpu", **SETTINGS) as llm:  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no decode step was recorded"):
            llm.update_settings(enforce_eager=False)
        assert tokens(llm.generate([[5, 6, 7]], GREEDY)) and not any(rank.num_replays for rank in ranks_of(llm))
