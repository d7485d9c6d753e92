"""What schema validation cannot see: that the manifests of one overlay agree with each other and with the server.

`problems(documents)` returns one sentence a fault, and an empty list for a sound overlay.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.deploy.paths import HERE

KUBERNETES = "1.34"
PROBES = {
    "startupProbe": "/health/startup",
    "readinessProbe": "/health/ready",
    "livenessProbe": "/health/live",
}
MODEL_HEADER = "X-Gateway-Model-Name"  # what a body-based router sets
MODELS = "/v1/models/"
# Of the custom resources only the fields in use, closed: a misspelt one is an error.
CUSTOM = yaml.safe_load((HERE / "custom_resources.yaml").read_text())
Document = dict[str, Any]


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template of a workload, as (name, template)."""
    name = f"{document['kind']}/{document['metadata']['name']}"
    if document["kind"] in ("Deployment", "Job"):
        yield name, document["spec"]["template"]
    elif document["kind"] == "LeaderWorkerSet":
        for part in ("leaderTemplate", "workerTemplate"):
            yield f"{name}.{part}", document["spec"]["leaderWorkerTemplate"][part]


def schema_problems(document: Document) -> Iterator[str]:
    """Unknown fields and wrong types, pod templates inside custom resources included."""
    where = f"{document['kind']}/{document['metadata']['name']}"
    key = f"{document['apiVersion']}/{document['kind']}"
    try:
        if key in CUSTOM:
            jsonschema.validate(document, CUSTOM[key])
            for name, template in templates(document):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
                where = name
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        yield f"{where}: {'/'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield f"{where}: {error.message}"


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    number, suffix = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi|Ti)?", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[suffix]


def container_problems(where: str, container: Document, volumes: set[str]) -> Iterator[str]:
    """Security, resources and mounts of one container."""
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("readOnlyRootFilesystem") is not True:
        yield f"{where} may escalate privileges or write to its root file system"
    if security.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{where} keeps capabilities"
    requests, limits = (container.get("resources", {}).get(part, {}) for part in ("requests", "limits"))
    for resource in ("cpu", "memory"):
        if resource not in requests or resource not in limits:
            yield f"{where} has no {resource} request or limit"
        elif quantity(requests[resource]) > quantity(limits[resource]):
            yield f"{where} requests more {resource} than its limit"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"{where} mounts the volume {mount['name']}, which the pod does not have"


def drain_problems(where: str, spec: Document, server: Document) -> Iterator[str]:
    """The grace period must hold preStop, the drain and the engine's stop."""
    environment = {entry["name"]: entry.get("value") for entry in server.get("env", [])}
    command = server.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if len(command) != 2 or "SHOAL_GRACE_SECONDS" not in environment:
        yield f"{where} has no preStop sleep or does not say how long it drains"
        return
    needed = float(command[1]) + float(environment["SHOAL_GRACE_SECONDS"]) + 10
    if spec.get("terminationGracePeriodSeconds", 30) < needed:
        yield f"{where} is killed before its drain ends ({needed:.0f} s)"


def operations_ports(server: Document) -> set[str]:
    """Names of the port on which the server answers health and metrics."""
    environment = {entry["name"]: entry.get("value") for entry in server.get("env", [])}
    return {
        p["name"]
        for p in server.get("ports", [])
        if str(p["containerPort"]) == environment.get("SHOAL_OPERATIONS_PORT")
    }


def server_problems(where: str, spec: Document) -> Iterator[str]:
    """Probes on the real routes and named port, and the drain."""
    for server in (container for container in spec["containers"] if container["name"] == "server"):
        ports = operations_ports(server)
        for probe, path in PROBES.items():
            get = server.get(probe, {}).get("httpGet", {})
            if get.get("path") != path or get.get("port") not in ports:
                yield f"{where} has no {probe} on {path} at the port of health and metrics"
        yield from drain_problems(where, spec, server)


def pod_problems(where: str, spec: Document, names: dict[str, set[str]]) -> Iterator[str]:
    """One pod template against the restricted profile and against what exists."""
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{where} may run as root or without seccomp"
    if spec.get("automountServiceAccountToken") is not False:
        yield f"{where} mounts a service account token"
    if spec.get("serviceAccountName") not in names["ServiceAccount"]:
        yield f"{where} runs under a service account that does not exist"
    for volume in spec.get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and claim not in names["PersistentVolumeClaim"]:
            yield f"{where} claims the volume {claim}, which does not exist"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        yield from container_problems(f"{where} {container['name']}", container, volumes)
    yield from server_problems(where, spec)
    yield from plan_problems(where, spec)


def matching(selector: dict[str, str], pods: dict[str, Document]) -> list[Document]:
    """The pod templates that carry every label of a selector."""
    return [pod for pod in pods.values() if selector.items() <= pod["metadata"]["labels"].items()]


def open_ports(pods: list[Document]) -> set[str | int]:
    """Names and numbers of the ports that some container of the pods opens."""
    entries = [p for pod in pods for c in pod["spec"]["containers"] for p in c.get("ports", [])]
    return {entry[key] for entry in entries for key in ("name", "containerPort")}


def selector_problems(document: Document, pods: dict[str, Document]) -> Iterator[str]:
    """Selectors that match no pod, and ports that the matched pods do not open."""
    where, spec = f"{document['kind']}/{document['metadata']['name']}", document["spec"]
    selector = spec["podSelector"] if document["kind"] == "NetworkPolicy" else spec["selector"]
    labels = selector if document["kind"] == "Service" else selector.get("matchLabels", {})
    found = matching(labels, pods)
    if not found:
        yield f"{where} selects no pod"
    wanted: list[str | int] = [port["targetPort"] for port in spec.get("ports", [])]
    wanted += [port["number"] for port in spec.get("targetPorts", [])]
    wanted += [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
    for port in wanted:
        if port not in open_ports(found):
            yield f"{where} points to the port {port}, which no selected pod opens"


def overlap_problems(documents: list[Document]) -> Iterator[str]:
    """Selectors of one server that reach the pods of another."""
    workloads = {name: d for d in documents if d["kind"] in ("Deployment", "Job") for name, d in templates(d)}
    for document in documents:
        where, selector = f"{document['kind']}/{document['metadata']['name']}", document.get("spec", {}).get("selector")
        if document["kind"] not in ("Deployment", "Service", "PodDisruptionBudget", "InferencePool"):
            continue
        labels = selector if document["kind"] == "Service" else selector.get("matchLabels", {})
        if len(found := sorted(name for name, pod in workloads.items() if matching(labels, {name: pod}))) > 1:
            yield f"{where} selects the pods of {' and '.join(found)}"


def served_models(server: Document) -> set[str]:
    """Names that clients may call a server's model by."""
    arguments = server["args"]
    names = {value for flag, value in pairwise(arguments) if flag == "--served-model-name"}
    return {PurePosixPath(arguments[0]).name} | names


def plan_problems(where: str, spec: Document) -> Iterator[str]:
    """A plan that is in no file or image of the pod."""
    sources = {volume["name"] for volume in spec.get("volumes", []) if "configMap" in volume or "image" in volume}
    for server in (container for container in spec["containers"] if container["name"] == "server"):
        mounts = {mount["mountPath"] for mount in server.get("volumeMounts", []) if mount["name"] in sources}
        for flag, path in pairwise(server.get("args", [])):
            if flag == "--plan" and not mounts & {path, *map(str, PurePosixPath(path).parents)}:
                yield f"{where} serves the plan {path}, which no ConfigMap or image is mounted at"


def model_problems(route: Document, documents: list[Document], pods: dict[str, Document]) -> Iterator[str]:
    """A route that sends a model's name to a server that does not have it, or nothing where no name is said."""
    services = {d["metadata"]["name"]: d["spec"]["selector"] for d in documents if d["kind"] == "Service"}
    rules = [(match, rule) for rule in route["spec"]["rules"] for match in rule["matches"]]
    for match, rule in rules:
        names = [header["value"] for header in match.get("headers", []) if header["name"] == MODEL_HEADER]
        names += [match["path"]["value"].removeprefix(MODELS)] if match["path"]["value"].startswith(MODELS) else []
        where = f"HTTPRoute/{route['metadata']['name']}"
        for backend in rule["backendRefs"]:
            found = matching(services.get(backend["name"], {}), pods)
            known = {n for pod in found for c in pod["spec"]["containers"] if c["name"] == "server"
                     for n in served_models(c)}  # fmt: skip
            for name in set(names) - known:
                yield f"{where} sends {name} to {backend['name']}, which does not serve it"
    if not any(set(match) == {"path"} and match["path"]["type"] == "PathPrefix" for match, _ in rules):
        yield f"HTTPRoute/{route['metadata']['name']} sends requests that name no model nowhere"


def adapted(documents: list[Document]) -> set[str]:
    """Names under which prometheus-adapter gives metrics, of series that a real server has."""
    scraped = set((HERE / "scraped_names.txt").read_text().split())
    files = [text for d in documents if d["kind"] == "ConfigMap" for text in d["data"].values()]
    rules = [rule for text in files for rule in yaml.safe_load(text)["rules"]]
    return {rule["name"]["as"] for rule in rules if rule["seriesQuery"].partition("{")[0] in scraped}


def reference_problems(documents: list[Document], names: dict[str, set[str]]) -> Iterator[str]:
    """Routes, monitors and autoscalers that point to nothing."""
    services = [d for d in documents if d["kind"] == "Service"]
    containers = [c for d in documents for _, pod in templates(d) for c in pod["spec"]["containers"]]
    operations = {port for c in containers if c["name"] == "server" for port in operations_ports(c)}
    for document in documents:
        where, spec = f"{document['kind']}/{document['metadata']['name']}", document.get("spec", {})
        if document["kind"] == "HTTPRoute":
            for backend in (b for rule in spec["rules"] for b in rule["backendRefs"]):
                ports = {p["port"] for s in services for p in s["spec"]["ports"]}
                kind = backend.get("kind", "Service")
                if backend["name"] not in names.get(kind, set()) or (
                    kind == "Service" and backend["port"] not in ports
                ):
                    yield f"{where} routes to {kind} {backend['name']}:{backend.get('port')}, which does not exist"
        if document["kind"] == "ServiceMonitor":
            wanted = spec["selector"]["matchLabels"].items()
            seen = [s for s in services if wanted <= s["metadata"]["labels"].items()]
            ports = {p["name"] for s in seen for p in s["spec"]["ports"] if p["targetPort"] in operations}
            if not {endpoint["port"] for endpoint in spec["endpoints"]} <= ports:
                yield f"{where} scrapes a port that leads to no metrics"
            if any(s["metadata"]["labels"].get(spec["jobLabel"]) != "shoal" for s in seen):
                yield f"{where} does not give the job label that the rules select"
        if document["kind"] == "HorizontalPodAutoscaler":
            if spec["scaleTargetRef"]["name"] not in names.get(spec["scaleTargetRef"]["kind"], set()):
                yield f"{where} scales something that does not exist"
            if unknown := {metric["pods"]["metric"]["name"] for metric in spec["metrics"]} - adapted(documents):
                yield f"{where} waits for {', '.join(sorted(unknown))}, which the adapter does not give"
            if spec["minReplicas"] > spec["maxReplicas"]:
                yield f"{where} wants at least more replicas than at most"
            if any(d["kind"] == "Deployment" and "replicas" in d["spec"] for d in documents):
                yield f"{where} fights with the Deployment over the number of replicas"


def peers_problems(job: Document, documents: list[Document]) -> Iterator[str]:
    """Pods of a Job that would wait for each other for ever: too few at once, or under a name that nobody has."""
    name, spec = job["metadata"]["name"], job["spec"]
    where, pod = f"Job/{name}", spec["template"]["spec"]
    command = " ".join(argument for container in pod["containers"] for argument in container["args"])
    if "--rdzv-endpoint" not in command:
        return
    wanted = {entry.get("value") for c in pod["containers"] for entry in c["env"] if entry["name"] == "PODS"}
    if wanted != {str(spec.get("completions"))} or spec.get("parallelism") != spec.get("completions"):
        yield f"{where} does not start at once as many pods as wait for each other"
    if spec.get("completionMode") != "Indexed":
        yield f"{where} has pods without a number, so none is the first"
    (endpoint,) = re.findall(r"--rdzv-endpoint (\S+)", command)
    host, _, port = endpoint.partition(":")
    if host != f"{name}-0.{pod.get('subdomain')}":
        yield f"{where} meets at {host}, which is not the name of its first pod"
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    service = services.get(pod.get("subdomain", ""), {})
    if service.get("clusterIP") != "None" or not matching(service["selector"], {name: spec["template"]}):
        yield f"{where} has pods whose names no headless Service gives"
    elif not service.get("publishNotReadyAddresses"):
        yield f"Service/{pod['subdomain']} hides pods that are not ready yet"
    elif port not in {str(each["port"]) for each in service["ports"]}:
        yield f"Service/{pod['subdomain']} lacks the port {port}"
    yield from _policy_of_peers(where, spec["template"]["metadata"]["labels"], documents)


def _policy_of_peers(where: str, labels: dict[str, str], documents: list[Document]) -> Iterator[str]:
    """Pods that may not reach each other on every port, in both directions."""
    pods = {where: {"metadata": {"labels": labels}}}
    for direction, side in (("ingress", "from"), ("egress", "to")):
        rules = [
            rule for d in documents if d["kind"] == "NetworkPolicy"
            and matching(d["spec"]["podSelector"].get("matchLabels", {}), pods) for rule in d["spec"].get(direction, [])
        ]  # fmt: skip
        selectors = [peer["podSelector"]["matchLabels"] for rule in rules if "ports" not in rule
                     for peer in rule[side] if set(peer) == {"podSelector"}]  # fmt: skip
        if not any(matching(selector, pods) for selector in selectors):
            yield f"{where} has pods that may not talk to each other ({direction})"


def rollout_problems(document: Document) -> Iterator[str]:
    """A rolling update that takes a replica away before its successor is ready."""
    rolling = document["spec"].get("strategy", {}).get("rollingUpdate", {})
    if rolling.get("maxUnavailable") != 0 or not rolling.get("maxSurge"):
        yield f"Deployment/{document['metadata']['name']} may have fewer ready replicas during an update"
    wanted = document["spec"]["selector"]["matchLabels"].items()
    if not wanted <= document["spec"]["template"]["metadata"]["labels"].items():
        yield f"Deployment/{document['metadata']['name']} does not select its own pods"


def problems(documents: list[Document]) -> list[str]:
    """Every fault of one rendered overlay."""
    names: dict[str, set[str]] = {"ServiceAccount": set(), "PersistentVolumeClaim": set()}
    for document in documents:
        names.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    found = [problem for document in documents for problem in schema_problems(document)]
    if found:
        return found
    pods = {name: template for document in documents for name, template in templates(document)}
    for name, template in pods.items():
        found += pod_problems(name, template["spec"], names)
    for document in documents:
        if document["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy", "InferencePool"):
            found += selector_problems(document, pods)
        if document["kind"] == "Deployment":
            found += rollout_problems(document)
        if document["kind"] == "Job":
            found += peers_problems(document, documents)
        if document["kind"] == "HTTPRoute":
            found += model_problems(document, documents, pods)
    found += overlap_problems(documents)
    return found + list(reference_problems(documents, names))
