"""`torchrun` on the whole of `prune-export`: what two processes make is what one makes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import pruning
from tests.conftest import free_port

ASKED = [
    "--emulation", "window", "--window", "8", "--window-sizes", "several", "--context", "64", "--kv-budget", "19.9%",
    "--codes", "0", "--format", "plan", "--sequence-length", "32", "--calibration-tokens", "256",
    "--score-tokens", "128", "--held-out-tokens", "256",
]  # fmt: skip


def agents(machines: int, processes: int) -> list[list[str]]:
    """The command of each machine's `torchrun`; all are this one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if machines == 1:
        return [[*torchrun, "--standalone"]]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    return [[*torchrun, "--nnodes", str(machines), *meeting]] * machines


def exported(commands: list[list[str]], asked: list[str], output: Path) -> list[str]:
    """What the processes of each command say while they export together."""
    environment = {
        **os.environ, "PYTHONPATH": str(Path(pruning.__file__).parents[1]), "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": f"{output}-cache",
    }  # fmt: skip
    program = [str(Path(sys.executable).with_name("prune-export")), *asked, "--output", str(output)]
    started = [
        subprocess.Popen([*command, *program], env=environment, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    return said


def made(output: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What `pruning.json` says but for how long it took, and the tensors of the plan."""
    manifest = json.loads((output / "pruning.json").read_text())
    for timed in ("stages", "digest", "files"):
        del manifest[timed]
    tensors = load_file(output / "plan.safetensors")
    return manifest, {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


@pytest.mark.slow
def test_windows_by_head_are_the_same_whoever_computes_them(pico_directory, text, tmp_path):
    asked = [str(pico_directory("llama")), "--calibration", str(text), *ASKED]
    exported([[]], asked, tmp_path / "alone")
    alone = made(tmp_path / "alone")
    assert alone[0]["quality"]["full_heads"], "no head is full: the plan says little"
    assert alone[0]["quality"]["windows"], "every window has the usual size: the plan says little"
    for machines, processes in ((1, 2), (2, 1)):
        output = tmp_path / f"on-{machines}"
        commands = [[*command, "--no-python"] for command in agents(machines, processes)]
        said = exported(commands, asked, output)
        assert made(output) == alone
        assert sum(each.count(f"wrote {output}") for each in said) == 1
        assert [each.count("\nscore: ") for each in said].count(1) == 1
