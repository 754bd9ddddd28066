"""What /metrics says, and that the dashboard and the alert rules ask for nothing else."""

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from argosy.engine.replica_messages import RankStats, ReplicaStats
from argosy.engine.step_times import STEP_BOUNDS_S, StepTimes
from argosy.server.engine_messages import EngineDescription, EngineSnapshot
from argosy.server.engine_metrics import EngineMetrics, RecentLoad
from argosy.server.engine_seat import EngineStatus

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/argosy.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
OF_PROMETHEUS = {"up"}  # what it adds itself, as the labels job and instance
# Every name in the queries of vLLM's own Grafana dashboard and of its predecessor, but the swapped requests, which
# neither of us has, and names of routers' queries.
VLLM_NAMES = [
    "e2e_request_latency_seconds_bucket",
    "e2e_request_latency_seconds_sum",
    "e2e_request_latency_seconds_count",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_per_output_token_seconds_bucket",
    "time_per_output_token_seconds_sum",
    "time_per_output_token_seconds_count",
    "inter_token_latency_seconds_bucket",
    "num_requests_running",
    "num_requests_waiting",
    "time_to_first_token_seconds_bucket",
    "time_to_first_token_seconds_sum",
    "time_to_first_token_seconds_count",
    "gpu_cache_usage_perc",
    "kv_cache_usage_perc",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_success_total",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_inference_time_seconds_sum",
    "request_max_num_generation_tokens_sum",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
    "request_time_per_output_token_seconds_bucket",
    "request_prefill_kv_computed_tokens_sum",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "cache_config_info",
    "prompt_tokens_cached_total",
]


class PlayedPool:
    """``WatchedPool`` of one engine with two ranks and two MoE layers."""

    description = EngineDescription(64, 64, 9, 16, "cpu", "float32", "float32", 1, 2, 2, 0.0)
    num_replays = 3

    def __init__(self) -> None:
        ranks = [
            RankStats(0, {"ep": {"x": 7}, "leaders": {"y": 1}}, [[30, 10], [5, 5]], waited_s={"ep": 0.5}),
            RankStats(1, {"ep": {"x": 3}}, [[0, 0], [5, 5]], num_replays=4, waited_s={"ep": 0.25}),
        ]
        times = StepTimes()
        for duration_s in (0.001, 0.004, 100.0):
            times.add(duration_s, 1)
        replica = ReplicaStats(3, 2, 50, 1, 4, 0.1, ranks, 2, 1, 8, 4, 3, 20, 10, times.total_s, times.counts)
        self.snapshot = EngineSnapshot(0.0, 0, True, [replica])

    @property
    def engines(self) -> list[EngineStatus]:
        status = EngineStatus(
            index=0,
            state="ready",
            pid=os.getpid(),
            num_restarts=2,
            since_s=0.0,
            last_message="",
            snapshot=self.snapshot,
            num_requests=5,
        )
        return [status]


def scrape(stand) -> dict[tuple[str, frozenset], float]:
    async def go() -> str:
        async with stand.client() as client:
            return (await client.get("/metrics")).text

    families = text_string_to_metric_families(asyncio.run(go()))
    found: dict[tuple[str, frozenset], float] = {}
    for sample in (sample for family in families for sample in family.samples):
        key = sample.name, frozenset(sample.labels.items())
        assert key not in found, f"{key} is told twice"
        found[key] = sample.value
    return found


def read(samples: dict, name: str, **labels: str) -> float:
    values = [
        value for (found, have), value in samples.items() if found == name and labels.items() <= dict(have).items()
    ]
    assert len(values) == 1, (name, labels, values)
    return values[0]


def ask(stand, **options: object) -> None:
    async def go() -> None:
        async with stand.client() as client:
            body = {"prompt": "6 * 7?", "max_tokens": 5, **options}
            assert (await client.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(go())


@pytest.fixture
def watched(build_stand):
    stand = build_stand(vllm_metric_names=True)
    stand.service.metrics.watch_engines(EngineMetrics("argosy-tiny", PlayedPool()))
    ask(stand)
    return stand


def labels_by_name(samples: dict) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, labels in samples:
        found.setdefault(name, set()).update(dict(labels))
    return found


def test_the_dashboard_and_the_alerts_ask_only_for_what_is_served(watched) -> None:
    served = labels_by_name(scrape(watched))
    assert len(EXPRESSIONS) > 50
    for expression in EXPRESSIONS:
        names = re.findall(r"(?:argosy:|process_)\w+|\bup\b", expression)
        assert names, expression
        unknown = [name for name in names if name not in served and name not in OF_PROMETHEUS]
        assert not unknown, f"{unknown} in {expression}"
        for name, selector in re.findall(r"((?:argosy:|process_)\w+)\{([^}]*)\}", expression):
            wanted = set(re.findall(r"(\w+)\s*[=!]~?", selector))
            assert wanted <= served[name] | {"job", "instance"}, f"{name} has no label of {wanted} in {expression}"
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            wanted = set(re.split(r",\s*", grouping))
            assert any(wanted <= served.get(name, set()) | {"job", "instance"} for name in names), expression


def test_the_dashboard_is_one_that_grafana_shows() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not covered & cells, f"{panel['title']} lies over another panel"
        cells |= covered
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"]), panel[
            "title"
        ]
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(DASHBOARD)))
    assert used == variables, (used, variables)


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 7
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert f"`{rule['alert']}`" in page, f"docs/operations.md does not say what to do about {rule['alert']}"


def test_metrics_that_the_operations_page_names_are_served(watched) -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    served = scrape(watched)
    named = set(re.findall(r"`(argosy:\w+|process_\w+)", page))
    assert len(named) > 15 and not named - {name for name, _ in served}, named - {name for name, _ in served}


def test_queries_of_vllms_dashboard_find_their_metrics(watched, build_stand) -> None:
    samples = scrape(watched)
    names = {name for name, labels in samples if dict(labels).get("model_name") == "argosy-tiny"}
    assert not {f"vllm:{name}" for name in VLLM_NAMES} - names
    assert read(samples, "vllm:time_per_output_token_seconds_count") == 4
    plain = build_stand()
    assert not any(name.startswith("vllm:") for name, _ in scrape(plain))


def test_a_request_is_counted_by_its_parts(stand) -> None:
    ask(stand)
    ask(stand, n=2, max_tokens=2)
    samples = scrape(stand)
    assert read(samples, "argosy:request_success_total", finished_reason="length") == 3
    assert read(samples, "argosy:request_success_total", finished_reason="abort") == 0
    assert read(samples, "argosy:generation_tokens_total") == 5 + 4
    assert read(samples, "argosy:request_max_num_generation_tokens_sum") == 5 + 2
    num_prompt = len(stand.tokenizer.encode_prompt("6 * 7?"))
    assert read(samples, "argosy:prompt_tokens_total") == 2 * num_prompt
    assert read(samples, "argosy:prompt_tokens_cached_total") == 2  # the played engine says one a request
    assert read(samples, "argosy:request_prefill_kv_computed_tokens_sum") == 2 * (num_prompt - 1)
    assert read(samples, "argosy:inter_token_latency_seconds_bucket", le="+Inf") == 4  # of n = 1 alone
    for part in ("queue", "prefill", "decode", "inference"):
        assert read(samples, f"argosy:request_{part}_time_seconds_count") == 2, part
    e2e = read(samples, "argosy:e2e_request_latency_seconds_sum")
    parts = [read(samples, f"argosy:request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(e2e)


def test_a_request_that_is_given_up_is_counted_as_aborted(stand) -> None:
    async def go() -> None:
        stand.pool.is_held = True
        async with stand.client() as client:
            body = {"prompt": "6 * 7?", "n": 2, "timeout": 0.05}
            assert (await client.post("/v1/completions", json=body)).status_code == 504

    asyncio.run(go())
    samples = scrape(stand)
    assert read(samples, "argosy:request_success_total", finished_reason="abort") == 2
    assert read(samples, "argosy:e2e_request_latency_seconds_count") == 0


def test_engines_tell_axes_layers_steps_and_blocks(watched) -> None:
    samples = scrape(watched)
    assert read(samples, "argosy:communication_bytes_total", axis="ep") == 10
    assert read(samples, "argosy:communication_bytes_total", axis="dp") == 1
    assert read(samples, "argosy:communication_seconds_total", axis="ep") == 0.75
    assert read(samples, "argosy:expert_imbalance", layer="0") == 3.0
    assert read(samples, "argosy:rank_imbalance", layer="0") == 2.0
    assert read(samples, "argosy:expert_imbalance", layer="1") == 1.0
    blocks = [read(samples, "argosy:cache_blocks", state=state) for state in ("used", "cached", "blank")]
    assert blocks == [4, 3, 1] and read(samples, "argosy:kv_cache_usage_perc") == 0.5
    assert read(samples, "argosy:engine_step_seconds_count") == 3
    assert read(samples, "argosy:engine_step_seconds_bucket", le="0.001") == 1
    assert read(samples, "argosy:engine_step_seconds_bucket", le="0.005") == 2
    assert read(samples, "argosy:engine_step_seconds_sum") == pytest.approx(100.005)
    assert read(samples, "argosy:engine_dummy_steps_total") == 2
    assert read(samples, "argosy:engine_restarts_total") == 2 and read(samples, "argosy:request_replays_total") == 3
    assert read(samples, "argosy:engine_resident_memory_bytes") > 1e6
    assert read(samples, "process_resident_memory_bytes") > 1e6 and read(samples, "argosy:build_info") == 1


def test_imbalance_is_that_of_the_last_minute() -> None:
    load = RecentLoad()
    load.take(0.0, [[100, 0]], [[100, 0]])
    assert load.tokens_per_expert == [[100, 0]]  # nothing is known from before
    for second in range(10, 121, 10):
        load.take(float(second), [[100, second]], [[100, second]])
    assert load.tokens_per_expert == [[0, 60]] and load.tokens_per_rank == [[0, 60]]
    load.take(130.0, [[1, 2]], [[1, 2]])  # a new process counts from 0
    assert load.tokens_per_expert == [[1, 2]]


def test_steps_are_counted_up_to_and_with_their_bound() -> None:
    times = StepTimes()
    for bound_s in STEP_BOUNDS_S:
        times.add(bound_s, 1)
        times.add(bound_s + 1e-9, 1)
    assert times.counts == [1, *[2] * (len(STEP_BOUNDS_S) - 1), 1]


def test_paths_that_clients_make_up_are_one_series(stand) -> None:
    async def go() -> None:
        async with stand.client() as client:
            for number in range(5):
                await client.get(f"/no/such/{number}")

    asyncio.run(go())
    assert read(scrape(stand), "argosy:http_requests_total", path="other", status="404") == 5
