"""Every overlay is sound, and the checks notice when one is not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy.cluster import problems
from tests.deploy.paths import DEPLOY, OVERLAYS
from tests.deploy.rendering import NAMES, Document, overlay, part, pod, rendered, server
from tests.deploy.scan import scans


@pytest.mark.parametrize("name", NAMES)
def test_overlay_is_sound(name: str) -> None:
    assert {p.name for p in OVERLAYS.iterdir()} == set(NAMES)
    assert problems(overlay(name)) == []


def with_component(folder: Path, name: str, component: str) -> list[Document]:
    """An overlay with a component of ours."""
    # Kustomize takes relative paths only.
    up = os.path.relpath(DEPLOY / "kubernetes", folder)
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{up}/overlays/{name}]\ncomponents: [{up}/components/{component}]\n"
    )
    return list(yaml.safe_load_all(rendered(folder)))


def test_inference_pool_is_sound(tmp_path: Path) -> None:
    documents = with_component(tmp_path, "gpu", "inference-pool")
    assert any(d["kind"] == "InferencePool" for d in documents)
    assert problems(documents) == []


def test_a_plan_in_an_image_is_sound(tmp_path: Path) -> None:
    documents = with_component(tmp_path, "plans", "plan-image")
    (plan,) = (v for v in window(documents)["volumes"] if v["name"] == "plan")
    assert set(plan) == {"name", "image"}
    assert problems(documents) == []
    plan.pop("image")
    assert any("no ConfigMap or image" in problem for problem in problems(documents))


def window(documents: list[Document]) -> Document:
    """The pod that serves the plan."""
    return part(documents, "Deployment", "shoal-window")["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def test_plans_share_one_model_and_differ_in_the_plan() -> None:
    documents = overlay("plans")
    dense, plan = pod(documents), window(documents)
    assert dense["containers"][0]["args"][0] == plan["containers"][0]["args"][0]
    claims = [v["persistentVolumeClaim"] for p in (dense, plan) for v in p["volumes"] if "persistentVolumeClaim" in v]
    assert claims[0] == claims[1]
    assert {v["name"] for v in plan["volumes"]} - {v["name"] for v in dense["volumes"]} == {"plan"}


FAULTS: dict[str, Callable[[list[Document]], object]] = {
    "unknown field": lambda d: server(d).update(imagePullPolice="Always"),
    "wrong type": lambda d: part(d, "Deployment")["spec"].update(replicas="two"),
    "misspelt field of a custom resource": lambda d: part(d, "ServiceMonitor")["spec"].update(endpoint=[]),
    "port name": lambda d: part(d, "Service")["spec"]["ports"][0].update(targetPort="web"),
    "probe port": lambda d: server(d)["readinessProbe"]["httpGet"].update(port="web"),
    "probe path": lambda d: server(d)["readinessProbe"]["httpGet"].update(path="/health"),
    "missing readiness probe": lambda d: server(d).pop("readinessProbe"),
    "missing startup probe": lambda d: server(d).pop("startupProbe"),
    "missing liveness probe": lambda d: server(d).pop("livenessProbe"),
    "service selector": lambda d: part(d, "Service")["spec"]["selector"].update({"app.kubernetes.io/name": "shaol"}),
    "deployment selector": lambda d: part(d, "Deployment")["spec"]["selector"]["matchLabels"].update(app="x"),
    "budget selector": lambda d: part(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(app="x"),
    "policy selector": lambda d: part(d, "NetworkPolicy", "shoal-server")["spec"]["podSelector"].update(
        matchLabels={"app.kubernetes.io/component": "serve"}
    ),
    "policy port": lambda d: part(d, "NetworkPolicy", "shoal-server")["spec"]["ingress"][0]["ports"][0].update(port=80),
    "probe on the port of clients": lambda d: server(d)["livenessProbe"]["httpGet"].update(port="http"),
    "scrape on the port of clients": lambda d: part(d, "ServiceMonitor")["spec"]["endpoints"][0].update(port="http"),
    "operations port": lambda d: next(
        entry for entry in server(d)["env"] if entry["name"] == "SHOAL_OPERATIONS_PORT"
    ).update(value="9999"),
    "monitor port": lambda d: part(d, "ServiceMonitor")["spec"]["endpoints"][0].update(port="metrics"),
    "job label": lambda d: part(d, "ServiceMonitor")["spec"].update(jobLabel="app.kubernetes.io/component"),
    "route port": lambda d: part(d, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].update(port=8000),
    "claim": lambda d: pod(d)["volumes"][0]["persistentVolumeClaim"].update(claimName="models"),
    "volume": lambda d: server(d)["volumeMounts"][0].update(name="model"),
    "service account": lambda d: pod(d).update(serviceAccountName="default"),
    "token": lambda d: pod(d).update(automountServiceAccountToken=True),
    "root": lambda d: pod(d)["securityContext"].pop("runAsNonRoot"),
    "writable root": lambda d: server(d)["securityContext"].update(readOnlyRootFilesystem=False),
    "capabilities": lambda d: server(d)["securityContext"].pop("capabilities"),
    "request over limit": lambda d: server(d)["resources"]["requests"].update(memory="5000Mi"),
    "no memory limit": lambda d: server(d)["resources"]["limits"].pop("memory"),
    "grace shorter than the drain": lambda d: pod(d).update(terminationGracePeriodSeconds=30),
    "no preStop": lambda d: server(d).pop("lifecycle"),
    "update below strength": lambda d: part(d, "Deployment")["spec"]["strategy"]["rollingUpdate"].update(
        maxUnavailable=1
    ),
    "autoscaler bounds": lambda d: part(d, "HorizontalPodAutoscaler")["spec"].update(minReplicas=9),
    "autoscaler metric": lambda d: part(d, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"].update(
        name="vllm:num_requests_waiting"
    ),
    "adapter series": lambda d: part(d, "ConfigMap", "shoal-prometheus-adapter")["data"].update(
        {"config.yaml": "rules: [{seriesQuery: 'vllm:queue{}', name: {as: shoal_requests_waiting}}]"}
    ),
    "autoscaler target": lambda d: part(d, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="x"),
    "autoscaler against replicas": lambda d: part(d, "Deployment")["spec"].update(replicas=2),
}


def rule(documents: list[Document]) -> Document:
    return part(documents, "HTTPRoute")["spec"]["rules"][0]  # type: ignore[no-any-return]


PLAN_FAULTS: dict[str, tuple[Callable[[list[Document]], object], str]] = {
    "a service of both plans": (
        lambda d: part(d, "Service")["spec"]["selector"].pop("shoal/plan"),
        "Service/shoal selects the pods of Deployment/shoal and Deployment/shoal-window",
    ),
    "a budget of both plans": (
        lambda d: part(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].pop("shoal/plan"),
        "PodDisruptionBudget/shoal selects the pods of",
    ),
    "a deployment that takes the other's pods": (
        lambda d: part(d, "Deployment")["spec"]["selector"]["matchLabels"].pop("shoal/plan"),
        "Deployment/shoal selects the pods of",
    ),
    "a plan that is not mounted": (
        lambda d: window(d)["containers"][0]["args"].__setitem__(2, "/plans/1"),
        "serves the plan /plans/1, which no ConfigMap or image is mounted at",
    ),
    "a plan on the volume of models": (
        lambda d: window(d)["containers"][0]["args"].__setitem__(2, "/models/plan.safetensors"),
        "serves the plan /models/plan.safetensors",
    ),
    "a model that its server does not have": (
        lambda d: rule(d)["matches"][0]["headers"][0].update(value="smollm2-135m-windows"),
        "sends smollm2-135m-windows to shoal-window, which does not serve it",
    ),
    "a card that its server does not have": (
        lambda d: rule(d)["matches"][1]["path"].update(value="/v1/models/nobody"),
        "sends nobody to shoal-window",
    ),
    "plans the wrong way round": (
        lambda d: rule(d)["backendRefs"][0].update(name="shoal"),
        "sends smollm2-135m-window to shoal, which does not serve it",
    ),
    "no way for other models": (
        lambda d: part(d, "HTTPRoute")["spec"]["rules"].pop(),
        "sends requests that name no model nowhere",
    ),
    "a misspelt field of a header": (
        lambda d: rule(d)["matches"][0]["headers"][0].update(kind="Exact"),
        "kind",
    ),
}


def job(documents: list[Document]) -> Document:
    return part(documents, "Job", "shoal-prune")["spec"]  # type: ignore[no-any-return]


def peers(documents: list[Document], kind: str) -> Document:
    """What lets the Job's pods find each other."""
    name = "shoal-prune" if kind == "Service" else "shoal-prune-peers"
    return part(documents, kind, name)["spec"]  # type: ignore[no-any-return]


PEER_FAULTS: dict[str, tuple[Callable[[list[Document]], object], str]] = {
    "one pod after the other": (lambda d: job(d).update(parallelism=1), "does not start at once"),
    "three pods, two that wait": (lambda d: job(d).update(completions=3, parallelism=3), "does not start at once"),
    "pods without a number": (lambda d: job(d).pop("completionMode"), "none is the first"),
    "another subdomain": (lambda d: job(d)["template"]["spec"].update(subdomain="shoal"), "is not the name of"),
    "a Service with an address": (lambda d: peers(d, "Service").pop("clusterIP"), "no headless Service"),
    "a Service of ready pods": (lambda d: peers(d, "Service").pop("publishNotReadyAddresses"), "hides pods"),
    "another port": (lambda d: peers(d, "Service")["ports"][0].update(port=29500), "lacks the port 29400"),
    "a Service of the servers": (
        lambda d: peers(d, "Service")["selector"].update({"app.kubernetes.io/component": "server"}),
        "no headless Service",
    ),
    "no way in": (lambda d: peers(d, "NetworkPolicy").pop("ingress"), "may not talk to each other (ingress)"),
    "one port out": (
        lambda d: peers(d, "NetworkPolicy")["egress"][0].update(ports=[{"port": 29400}]),
        "may not talk to each other (egress)",
    ),
}


OVERLAY_FAULTS = [("plans", *each) for each in PLAN_FAULTS.items()]
OVERLAY_FAULTS += [("prune-pods", *each) for each in PEER_FAULTS.items()]


@pytest.mark.parametrize(
    ("name", "fault", "planted"), OVERLAY_FAULTS, ids=[f"{each[0]}: {each[1]}" for each in OVERLAY_FAULTS]
)
def test_planted_fault_in_an_overlay_is_found(
    name: str, fault: str, planted: tuple[Callable[[list[Document]], object], str]
) -> None:
    documents = overlay(name)
    plant, told = planted
    plant(documents)
    assert any(told in problem for problem in problems(documents)), fault


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault: str) -> None:
    documents = overlay("autoscale")
    FAULTS[fault](documents)
    assert problems(documents) != []


def test_planted_fault_in_a_group_is_found() -> None:
    documents = overlay("multi-node")
    group = part(documents, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    group["leaderTemplate"]["spec"]["containers"][0]["readinesProbe"] = {}
    assert "readinesProbe" in problems(documents)[0]


@pytest.mark.parametrize("name", NAMES)
def test_checkov_finds_nothing(name: str) -> None:
    scan = scans()[f"{name}.yaml"]
    assert scan.failed == set()
    assert len(scan.passed) > 50


def test_checkov_finds_a_planted_fault() -> None:
    assert scans()["planted.yaml"].failed == {"CKV_K8S_16"}


def test_every_skipped_rule_is_justified() -> None:
    skipped = [
        value
        for name in NAMES
        for document in overlay(name)
        for key, value in document["metadata"].get("annotations", {}).items()
        if key.startswith("checkov.io/skip")
    ]
    assert skipped
    assert all(len(value.partition("=")[2].split()) > 5 for value in skipped)
