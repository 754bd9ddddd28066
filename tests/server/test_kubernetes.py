"""The manifests of ``deploy/kubernetes``: valid by schema, consistent with each other, and true of the program."""

import asyncio
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from argosy.cli.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE, ServeOptions, read_settings
from argosy.config import EngineConfig
from argosy.server.engine_messages import EngineSnapshot
from argosy.server.engine_metrics import EngineMetrics
from argosy.server.metrics import ServerMetrics
from tests.helpers.deployed import DEPLOY, least_grace_s, read_serve_command

SCHEMAS = Path(__file__).parent / "schemas"
SETS = {"one-node": ("common", "one-node"), "two-nodes": ("common", "two-nodes")}
VALUES = "prometheus-adapter.yaml"  # of a Helm chart: no object of the cluster
OURS = (KEY_VARIABLE, ADMIN_KEY_VARIABLE)

Manifest = dict[str, Any]


@cache
def read_manifests(*directories: str) -> tuple[Manifest, ...]:
    paths = [path for name in directories for path in sorted((DEPLOY / "kubernetes" / name).glob("*.yaml"))]
    assert paths, directories
    return tuple(
        document
        for path in paths
        if path.name != VALUES
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    )


@cache
def build_validator(kind: str) -> jsonschema.Draft202012Validator:
    kubernetes, custom = (json.loads((SCHEMAS / f"{name}.json").read_text()) for name in ("kubernetes", "custom"))
    definition = (kubernetes["kinds"] | custom["kinds"])[kind]
    definitions = kubernetes["$defs"] | custom["$defs"]
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": definitions})


def check_manifest(manifest: Manifest) -> None:
    build_validator(manifest["kind"]).validate(manifest)


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def read_pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[Manifest, int]]:
    """Every pod template, and how many pods of the kind meet as nodes."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            yield manifest["spec"]["template"], 1
        if manifest["kind"] == "LeaderWorkerSet":
            template = manifest["spec"]["leaderWorkerTemplate"]
            yield template["leaderTemplate"], template["size"]
            yield template["workerTemplate"], template["size"]


def expand(arguments: list[str], num_nodes: int) -> list[str]:
    """As the kubelet does, with what LeaderWorkerSet puts into the environment."""
    values = {
        "LWS_GROUP_SIZE": str(num_nodes),
        "LWS_WORKER_INDEX": "1",
        "LWS_LEADER_ADDRESS": "argosy-0.argosy.default",
    }
    values["POD_IP"] = "10.0.0.1"
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match.group(1)], argument) for argument in arguments]


def read_command(template: Manifest, num_nodes: int) -> tuple[ServeOptions, EngineConfig]:
    (container,) = template["spec"]["containers"]
    assert "command" not in container  # the image's entry point is the program
    return read_serve_command(expand(container["args"], num_nodes))


@pytest.fixture(params=sorted(SETS))
def manifests(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    return read_manifests(*SETS[request.param])


def test_every_manifest_is_valid_by_its_schema(manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        check_manifest(manifest)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Service", lambda spec: spec.update(selectors={})),
        ("HorizontalPodAutoscaler", lambda spec: spec.update(minReplicas="one")),
        ("LeaderWorkerSet", lambda spec: spec["leaderWorkerTemplate"].update(restartPolicy="Always")),
        ("LeaderWorkerSet", lambda spec: spec["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(container=[])),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(interval="15 seconds")),
    ],
)
def test_the_schemas_refuse_what_a_cluster_would(kind: str, change: Any) -> None:
    manifest = json.loads(json.dumps(of_kind(read_manifests(*SETS["two-nodes"]), kind)))
    change(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check_manifest(manifest)


def test_every_command_line_is_the_programs(manifests: tuple[Manifest, ...]) -> None:
    pods = list(read_pods(manifests))
    configs = [read_command(*pod)[1] for pod in pods]
    for (template, num_nodes), config in zip(pods, configs, strict=True):
        cards = int(template["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        assert config.nnodes == num_nodes and config.world_size == cards * num_nodes
    assert [config.node_rank for config in configs] == list(range(len(pods)))
    assert len({(config.master_port, config.startup_timeout_s, config.ep_size) for config in configs}) == 1


def test_pods_are_given_the_time_that_a_drain_takes(manifests: tuple[Manifest, ...]) -> None:
    for template, num_nodes in read_pods(manifests):
        options, _ = read_command(template, num_nodes)
        before_s = template["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert template["spec"]["terminationGracePeriodSeconds"] > least_grace_s(options, before_s)
        assert before_s == 10  # of all pods: a worker that left before its leader would take the requests along


def test_pods_run_without_privileges(manifests: tuple[Manifest, ...]) -> None:
    for template, _ in read_pods(manifests):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        context = spec["containers"][0]["securityContext"]
        assert not context["allowPrivilegeEscalation"] and context["readOnlyRootFilesystem"]
        assert context["capabilities"]["drop"] == ["ALL"] and not spec["automountServiceAccountToken"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == volumes


def test_keys_come_from_the_secret_through_variables_that_the_server_reads(manifests: tuple[Manifest, ...]) -> None:
    secret = of_kind(manifests, "Secret")
    for template, num_nodes in read_pods(manifests):
        options, config = read_command(template, num_nodes)
        references = {
            each["name"]: each["valueFrom"]["secretKeyRef"]
            for each in template["spec"]["containers"][0].get("env", ())
            if "secretKeyRef" in each.get("valueFrom", {})
        }
        assert set(references) == (set() if config.node_rank else set(OURS))
        assert all(reference["name"] == secret["metadata"]["name"] for reference in references.values())
        values = {name: secret["stringData"][reference["key"]] for name, reference in references.items()}
        settings = read_settings(options, values)
        monitor = of_kind(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]
        assert config.node_rank or (secret["stringData"][monitor["key"]] in settings.api_key and settings.admin_api_key)


async def answers(client: httpx.AsyncClient, paths: list[str]) -> list[int]:
    return [(await client.get(path)).status_code for path in paths]


def test_ports_and_paths_are_the_servers(manifests: tuple[Manifest, ...], build_stand: Any) -> None:
    monitor = of_kind(manifests, "PodMonitor")["spec"]
    paths = [endpoint["path"] for endpoint in monitor["podMetricsEndpoints"]]
    for template, num_nodes in read_pods(manifests):
        options, config = read_command(template, num_nodes)
        (container,) = template["spec"]["containers"]
        if config.node_rank:
            assert not {"ports", "readinessProbe", "livenessProbe"} & set(container)  # it has no API
            continue
        assert container["ports"] == [{"name": "http", "containerPort": options.port}]
        assert not options.is_loopback
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
        assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
        assert asyncio.run(answers(build_stand().client(), ["/ready", "/health", *paths])) == [200] * (2 + len(paths))
    assert of_kind(manifests, "Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["http"]


def test_selectors_find_the_pods_with_the_api_and_no_others(manifests: tuple[Manifest, ...]) -> None:
    labels = [(read_command(*pod)[1].node_rank, pod[0]["metadata"]["labels"]) for pod in read_pods(manifests)]

    def find(selector: dict[str, str]) -> list[int]:
        return [node_rank for node_rank, each in labels if selector.items() <= each.items()]

    everyone = [node_rank for node_rank, _ in labels]
    assert find(of_kind(manifests, "Service")["spec"]["selector"]) == [0]
    assert find(of_kind(manifests, "PodMonitor")["spec"]["selector"]["matchLabels"]) == [0]
    assert find(of_kind(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]) == everyone
    policy = of_kind(manifests, "NetworkPolicy")["spec"]
    assert find(policy["podSelector"]["matchLabels"]) == everyone
    inside = policy["ingress"][0]
    assert find(inside["from"][0]["podSelector"]["matchLabels"]) == everyone and "ports" not in inside
    assert policy["ingress"][1]["ports"] == [{"port": "http"}]


def test_the_autoscaler_asks_for_a_metric_that_the_server_has(manifests: tuple[Manifest, ...]) -> None:
    scaler = of_kind(manifests, "HorizontalPodAutoscaler")["spec"]
    target = of_kind(manifests, scaler["scaleTargetRef"]["kind"])
    assert scaler["scaleTargetRef"] == {
        "apiVersion": target["apiVersion"], "kind": target["kind"], "name": target["metadata"]["name"]
    }  # fmt: skip
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "common" / VALUES).read_text(encoding="utf-8"))
    (rule,) = adapter["rules"]["custom"]
    series = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert series is not None
    replacement = re.sub(r"\$\{(\d)\}", r"\\\1", rule["name"]["as"])
    offered = {
        re.sub(rule["name"]["matches"], replacement, name) for name in metric_names() if re.search(series[1], name)
    }
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]} <= offered
    assert offered == {"argosy_num_requests_waiting", "argosy_num_requests_running"}


def metric_names() -> set[str]:
    """Of a server with one engine, as Prometheus stores them."""
    engine = SimpleNamespace(
        index=0, state="ready", pid=None, num_restarts=0, num_requests=0, snapshot=EngineSnapshot(0.0, 0, False, [])
    )
    pool = SimpleNamespace(
        description=SimpleNamespace(ep_size=1, num_blocks=1, block_size=64, number_format=""),
        engines=[engine],
        num_replays=0,
    )
    metrics = ServerMetrics("model", "0")
    metrics.watch_engines(EngineMetrics("model", pool))  # type: ignore[arg-type]
    text = metrics.render(with_vllm_names=False).decode()
    return {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}
