"""The equality table: one model, many topologies, the same greedy tokens.

Every row starts a deployment and runs the same prompts through every way in which its ranks can exchange tokens,
prefill and share out requests; one rank of the same number format, whole prefill, is what all are compared with
(``number_formats.py``). It judges, it does not print. A feature that changes how tokens are computed adds a column or a
row here. Invariant: a cell that passes has compared at least one token, and replayed a step if it is about replays.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from argosy.config import EngineConfig, EPMode
from argosy.engine.generation import LLM
from argosy.messages import CompletionOutput, RequestOutput
from argosy.platforms import select_platform
from argosy.sampling_params import SamplingParams
from argosy.validation.number_formats import NumberFormat, Tolerance

CHUNK_TOKENS = 48  # of a chunked prefill: less than any prompt's length, so that chunks of several requests mix
NUM_TOP = 5  # alternatives whose log probabilities are known at a difference


@dataclass(frozen=True, order=True, slots=True)
class Topology:
    """How many replicas, of how many ranks; the experts are spread over all of them."""

    dp_size: int
    tp_size: int

    @property
    def num_ranks(self) -> int:
        return self.dp_size * self.tp_size

    @property
    def name(self) -> str:
        return f"dp{self.dp_size} tp{self.tp_size}"


SIZES = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (2, 4), (4, 2), (2, 8))  # (dp_size, tp_size)
TOPOLOGIES = tuple(Topology(*sizes) for sizes in SIZES)
EP_MODES: tuple[EPMode, ...] = ("high_throughput", "low_latency", "all_gather")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the prompts on a topology."""

    ep_mode: EPMode
    is_chunked: bool
    is_balanced: bool
    is_async: bool = False  # the next step is planned while one runs
    is_recorded: bool = False  # decode steps from device graphs; on a CPU, from the batches that those would have

    @property
    def name(self) -> str:
        prefill = "chunked" if self.is_chunked else "whole"
        share = "balanced" if self.is_balanced else "all on one replica"
        extras = f"{', async' if self.is_async else ''}{', recorded' if self.is_recorded else ''}"
        return f"{self.ep_mode}, {prefill}, {share}{extras}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WayResult:
    """How one way compares with one rank."""

    way: Way
    num_tokens: int  # compared
    num_equal: int  # before the first difference, over all requests
    logprob_difference: float  # the largest, over the equal tokens
    median_difference: float  # over the same tokens
    largest_gap: float  # see ``_gap``; 0 if all tokens are equal
    tolerance: Tolerance
    num_replays: int = 0  # steps from recordings, on the rank with the fewest

    @property
    def passed(self) -> bool:
        is_close = self.logprob_difference <= self.tolerance.logprob_difference
        is_close = is_close and self.median_difference <= self.tolerance.median_difference
        is_tie = self.largest_gap <= self.tolerance.gap
        if self.way.is_recorded and not self.num_replays:
            return False
        return 0 < self.num_tokens * self.tolerance.share <= self.num_equal and is_close and is_tie


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyResult:
    """One row."""

    topology: Topology
    number_format: str
    start_s: float
    ways: list[WayResult]

    @property
    def name(self) -> str:
        return self.topology.name

    @property
    def num_ranks(self) -> int:
        return self.topology.num_ranks

    @property
    def passed(self) -> bool:
        return bool(self.ways) and all(way.passed for way in self.ways)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What every way runs."""

    prompts: list[list[int]]
    num_tokens: int  # greedy, per prompt
    max_num_seqs: int = 16  # of a replica: steps are recorded for batches of up to as many


def compare_topologies(
    number_format: NumberFormat,
    workload: Workload,
    topologies: Sequence[Topology] = TOPOLOGIES,
    *,
    in_pairs: bool = False,
) -> Iterator[TopologyResult]:
    """One result a topology, in order. The format's config gives the model, device and dtype; its sizes are replaced.

    ``in_pairs``: about half of the combinations, among which every two choices still meet.

    Raises:
        ValueError: a topology that this model or this machine cannot have.
        RuntimeError: a deployment that failed.
    """
    is_cpu = select_platform(number_format.config.device).device_type == "cpu"
    config = dataclasses.replace(
        number_format.config,
        max_num_seqs=workload.max_num_seqs,
        enable_prefix_caching=False,
        async_scheduling=False,
        emulate_graphs=is_cpu,
    )
    expected: list[CompletionOutput] | None = None
    for topology in topologies if Topology(1, 1) in topologies else (Topology(1, 1), *topologies):
        started_s = time.monotonic()
        with closing(LLM.from_config(_with_topology(config, topology))) as llm:
            start_s = time.monotonic() - started_s
            llm.update_settings(enforce_eager=True)
            if expected is None:
                expected = _run(llm, workload, None)
            if topology not in topologies:
                continue
            tolerance = number_format.tolerance(llm.dtype_name, topology.tp_size)
            ways = _ways(topology) + (_recorded_ways(topology) if llm.num_graphs else [])
            if in_pairs:
                ways = [way for way in ways if _is_of_the_pairs(way, topology)]
            results = [_compare(llm, workload, way, expected, tolerance) for way in ways]
        yield TopologyResult(topology=topology, number_format=number_format.name, start_s=start_s, ways=results)


def _with_topology(config: EngineConfig, topology: Topology) -> EngineConfig:
    return dataclasses.replace(config, dp_size=topology.dp_size, tp_size=topology.tp_size, ep_size=None)


def _ways(topology: Topology) -> list[Way]:
    """One rank exchanges nothing, so it has one mode; one replica has nothing to balance.

    Asynchronous scheduling runs once a mode, where it meets the most: chunks, and replicas that end at different times.
    """
    modes: tuple[EPMode, ...] = EP_MODES if topology.num_ranks > 1 else ("auto",)
    ways = [
        Way(mode, chunked, balanced) for mode in modes for chunked in (False, True) for balanced in _balances(topology)
    ]
    return ways + [Way(mode, is_chunked=True, is_balanced=True, is_async=True) for mode in modes]


def _recorded_ways(topology: Topology) -> list[Way]:
    """In the mode that small steps are recorded in, with chunks: while a replica prefills, nobody replays."""
    mode: EPMode = "low_latency" if topology.num_ranks > 1 else "auto"
    ways = [Way(mode, is_chunked=True, is_balanced=balanced, is_recorded=True) for balanced in _balances(topology)]
    return [*ways, Way(mode, is_chunked=True, is_balanced=True, is_async=True, is_recorded=True)]


def _is_of_the_pairs(way: Way, topology: Topology) -> bool:
    """Of a topology's ways, enough that every two choices (mode, prefill, balance, and so on) meet."""
    if way.is_async:
        return way.is_recorded or way.ep_mode == "low_latency"
    if topology.dp_size == 1:
        return not way.is_recorded  # the asynchronous way replays too
    if way.is_recorded:
        return not way.is_balanced
    return way.is_balanced == ((EP_MODES.index(way.ep_mode) + way.is_chunked) % 2 == 0)


def _balances(topology: Topology) -> tuple[bool, ...]:
    return (True, False) if topology.dp_size > 1 else (True,)


def _compare(
    llm: LLM, workload: Workload, way: Way, expected: list[CompletionOutput], tolerance: Tolerance
) -> WayResult:
    prompt_tokens = sum(len(prompt) for prompt in workload.prompts)
    llm.update_settings(
        ep_mode=way.ep_mode,
        # Low latency by choice, whatever the number of tokens; overflow is impossible by agreement.
        max_num_batched_tokens=CHUNK_TOKENS if way.is_chunked else prompt_tokens,
        async_scheduling=way.is_async,
        enforce_eager=not way.is_recorded,
    )
    replays_before = _num_replays(llm)
    found = _run(llm, workload, None if way.is_balanced else llm.config.dp_size - 1)
    num_equal, gap, differences = 0, 0.0, [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        same = _num_equal(ours.token_ids, theirs.token_ids)
        num_equal += same
        differences += _logprob_differences(ours, theirs, same)
        if same < len(theirs.token_ids):
            gap = max(gap, _gap(theirs, same, ours.token_ids[same]))
    return WayResult(
        way=way,
        num_tokens=sum(len(completion.token_ids) for completion in expected),
        num_equal=num_equal,
        logprob_difference=max(differences),
        median_difference=statistics.median(differences),
        largest_gap=gap,
        tolerance=tolerance,
        num_replays=min(b - a for a, b in zip(replays_before, _num_replays(llm), strict=True)),
    )


def _num_replays(llm: LLM) -> list[int]:
    return [rank.num_replays for replica in llm.collect_stats() for rank in replica.ranks]


def _run(llm: LLM, workload: Workload, data_parallel_rank: int | None) -> list[CompletionOutput]:
    params = SamplingParams(temperature=0.0, max_tokens=workload.num_tokens, ignore_eos=True, logprobs=NUM_TOP)
    results = llm.generate(workload.prompts, params, use_tqdm=False, data_parallel_rank=data_parallel_rank)
    return [result.outputs[0] for result in results if isinstance(result, RequestOutput)]


def _num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(theirs))


def _logprob_differences(ours: CompletionOutput, theirs: CompletionOutput, count: int) -> Iterator[float]:
    assert ours.logprobs is not None and theirs.logprobs is not None
    for a, b in zip(ours.logprobs[:count], theirs.logprobs[:count], strict=True):
        yield abs(a.logprob - b.logprob)


def _gap(expected: CompletionOutput, position: int, token_id: int) -> float:
    """How much less likely one rank found ``token_id`` than the token it took: small at a tie, inf beyond the top."""
    assert expected.logprobs is not None
    alternatives = expected.logprobs[position]
    known = dict(zip(alternatives.top_token_ids, alternatives.top_logprobs, strict=True))
    return alternatives.logprob - known.get(token_id, -math.inf)
