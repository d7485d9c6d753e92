"""The Compose file is valid, each profile starts what it says, and what it mounts and names exists."""

import json
from typing import Any

import pytest
import yaml

from tests.deploy.paths import PROMETHEUS, ROOT
from tests.deploy.tools import run

ALWAYS = {"prune", "prometheus", "alertmanager", "grafana"}
PROFILES = {
    (): ALWAYS | {"server"},
    ("gpu",): ALWAYS | {"server-gpu"},
    ("cpu", "load"): ALWAYS | {"server", "load"},
    ("gpu", "load"): ALWAYS | {"server-gpu", "load"},
}


def config(*profiles: str) -> dict[str, Any]:
    """The file as Compose resolves it."""
    flags = [part for profile in profiles for part in ("--profile", profile)]
    done = run("docker-compose", "-f", ROOT / "docker-compose.yml", *flags, "config", "--format", "json")
    # The program from PyPI ends with 0 whatever Compose says, so what it says is what counts.
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("profiles", PROFILES, ids=lambda profiles: "+".join(profiles) or "default")
def test_profile_starts_its_services(profiles: tuple[str, ...]) -> None:
    assert set(config(*profiles)["services"]) == PROFILES[profiles]


def test_an_unknown_field_is_refused(tmp_path: Any) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    (tmp_path / "docker-compose.yml").write_text(text.replace("read_only: true", "readonly: true"))
    done = run("docker-compose", "-f", tmp_path / "docker-compose.yml", "config", "-q")
    assert "readonly' not allowed" in done.stderr


def test_everything_is_confined_and_pinned() -> None:
    for name, service in (config("cpu", "load")["services"] | config("gpu")["services"]).items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        tag = service["image"].rpartition(":")[2]
        assert tag[0] in "v0123456789", name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name


def test_every_mounted_file_exists() -> None:
    for service in config("cpu", "load")["services"].values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert (ROOT / volume["source"]).exists(), volume["source"]


def test_prometheus_finds_the_server_and_the_alertmanager() -> None:
    document = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = (job for job in document["scrape_configs"] if job["job_name"] == "shoal")
    (names,) = job["dns_sd_configs"]
    (manager,) = document["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    services = config()["services"]
    assert set(names["names"]) <= services.keys()
    assert str(names["port"]) in services["server"]["command"]
    assert manager.partition(":")[0] in services
    assert "server" in config("gpu")["services"]["server-gpu"]["networks"]["shoal"]["aliases"]
