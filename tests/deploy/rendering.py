"""The overlays as Kustomize renders them, and their parts."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.paths import OVERLAYS
from tests.deploy.tools import run

NAMES = ("cpu", "gpu", "autoscale", "multi-node", "plans", "prune-pods")
Document = dict[str, Any]


@cache
def rendered(directory: Path) -> str:
    done = run("kubectl", "kustomize", directory)
    assert done.returncode == 0, done.stderr
    return done.stdout


def overlay(name: str) -> list[Document]:
    return list(yaml.safe_load_all(rendered(OVERLAYS / name)))


def part(documents: list[Document], kind: str, name: str = "shoal") -> Document:
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)


def pod(documents: list[Document]) -> Document:
    return part(documents, "Deployment")["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def server(documents: list[Document]) -> Document:
    return pod(documents)["containers"][0]  # type: ignore[no-any-return]
