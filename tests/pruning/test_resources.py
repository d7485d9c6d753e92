"""Requests follow the bytes of the checkpoint; nonsense is one line."""

import sys

import pytest
import yaml

from pruning.cli import main
from pruning.models.checkpoint import read_manifest
from pruning.resources import GIB, plan_resources, whole_gib


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["prune-export", "plan-resources", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_prints_a_container_s_resources(monkeypatch, pico_checkpoint, capsys):
    assert run(monkeypatch, pico_checkpoint()[0], "--kv-gib", 3, "--cores", 4) == 0
    resources = yaml.safe_load(capsys.readouterr().out)["resources"]
    # Weights of some kilobytes, 3 GiB of cache, 2.25 GiB of run time.
    assert resources["requests"] == {"cpu": "4", "memory": "6Gi"}
    assert resources["limits"] == {"cpu": "8", "memory": "6Gi"}


def test_weights_and_cache_count(tmp_path, pico_checkpoint):
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.truncate(10 * GIB)
    plan = plan_resources(tmp_path, 1.0)
    assert plan.weight_bytes == 10 * GIB
    assert plan.memory_bytes == 15 * GIB  # 11.5 + 1 + 2.25
    assert plan.storage_bytes == 22 * GIB
    assert plan.kv_tokens is None
    directory = pico_checkpoint()[0]
    assert plan_resources(directory, 2.0).kv_tokens == 2 * GIB // read_manifest(directory).sizes["kv_per_token"]


@pytest.mark.parametrize(("size", "gib"), [(1, 1), (GIB, 1), (GIB + 1, 2)])
def test_rounds_up(size, gib):
    assert whole_gib(size) == gib * GIB


@pytest.mark.parametrize("arguments", [("--kv-gib", "0"), ("--cores", "0"), ("--kv-gib", "nan")])
def test_nonsense_is_one_line(monkeypatch, pico_checkpoint, capsys, arguments):
    assert run(monkeypatch, pico_checkpoint()[0], *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_weights_is_one_line(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path) == 2
    assert "holds no *.safetensors" in capsys.readouterr().err
