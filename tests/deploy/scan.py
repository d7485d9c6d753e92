"""What checkov says of the image files and the rendered overlays, and of one planted fault in each kind.

One run for all: checkov's start costs more than its rules.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.deploy.paths import DEPLOY, OVERLAYS
from tests.deploy.rendering import NAMES, overlay, rendered, server
from tests.deploy.tools import run

IMAGES = sorted(path.name for path in DEPLOY.glob("Dockerfile*") if path.suffix != ".dockerignore")


class Scan(NamedTuple):
    """Rules that a file passed and failed."""

    passed: set[str]
    failed: set[str]


def image_with_faults() -> str:
    """The image file with an unpinned package and without its user."""
    text = (DEPLOY / "Dockerfile").read_text()
    return text.replace("libnuma1=2.0.16-1", "libnuma1").replace("USER 10001:10001", "")


def fill(folder: Path) -> None:
    """Put everything that is scanned into one folder."""
    for name in IMAGES:
        (folder / name).write_text((DEPLOY / name).read_text())
    (folder / "Dockerfile.planted").write_text(image_with_faults())
    for name in NAMES:
        (folder / f"{name}.yaml").write_text(rendered(OVERLAYS / name))
    documents = overlay("cpu")
    server(documents)["securityContext"]["privileged"] = True
    (folder / "planted.yaml").write_text(yaml.safe_dump_all(documents))


@cache
def scans() -> dict[str, Scan]:
    """By file name; a file that checkov read nothing from is missing."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        flags = ("--framework", "kubernetes", "dockerfile", "--skip-download", "--compact", "-o", "json")
        done = run("checkov", "-d", folder, *flags, LOG_LEVEL="CRITICAL")
    found: dict[str, Scan] = {}
    for report in json.loads(done.stdout):
        for check in report["results"]["passed_checks"] + report["results"]["failed_checks"]:
            scan = found.setdefault(check["file_path"].lstrip("/"), Scan(set(), set()))
            (scan.passed if check["check_result"]["result"] == "PASSED" else scan.failed).add(check["check_id"])
    return found
