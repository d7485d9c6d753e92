"""Blocks from disk give the same scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pruning
from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.forward.streaming import open_streamed
from pruning.importance import Sampling, metric
from pruning.models.finding import find_model
from pruning.models.loading import load_model
from pruning.plan import KINDS, Unit
from tests.conftest import pico_model, pico_tokenizer, run_prune_export

UNITS = [Unit(block, kind) for block in range(6) for kind in KINDS]


# transformers stacks the experts of these while it loads them; their files hold other names.
MIXTURES = {"mixtral", "qwen3_moe"}


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_mixtures_of_experts_are_refused_before_any_work(
    monkeypatch, pico_directory, text, tmp_path, capsys, model_type
):
    hashed: list[object] = []
    monkeypatch.setattr("pruning.forward.streaming.hash_each", hashed.append)
    saved = tmp_path / "scores.json"
    flags = ["--stream", "--calibration", text, "--calibration-tokens", 256, "--sequence-length", 32]
    assert run_prune_export(monkeypatch, "score", pico_directory(model_type), *flags, "--output", saved) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "mixtures of experts" in lines[0]
    assert not hashed
    assert not saved.exists()


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - MIXTURES))
def test_streamed_scores_equal_those_of_the_whole_model(pico_directory, model_type):
    source = find_model(str(pico_directory(model_type)), Reporter())
    whole = load_model(source, "float32", "cpu")
    streamed, residency = open_streamed(source, "float32", "cpu")
    ids = torch.randint(3, 320, (4, 20), generator=torch.Generator().manual_seed(1))
    for name in ("cosine", "leave-one-out", "kl", "logit-shapley"):
        function = metric(name).load()
        found = [
            function(
                Evaluator(dense.model, dense.family, ids, 2, residency=where), UNITS, Sampling(samples=1), Reporter()
            )
            for dense, where in ((whole, None), (streamed, residency))
        ]
        for unit in UNITS:
            assert found[1].values[unit] == pytest.approx(found[0].values[unit], abs=1e-5, rel=1e-5)
    assert all(parameter.device.type == "meta" for parameter in streamed.model.parameters())


def test_one_block_is_held_at_a_time(pico_directory):
    source = find_model(str(pico_directory("llama")), Reporter())
    streamed, residency = open_streamed(source, "float32", "cpu")
    held = []
    evaluator = Evaluator(streamed.model, streamed.family, torch.ones(1, 8, dtype=torch.int64), residency=residency)

    def visit(number, sublayer, before, after):
        here = {n.split(".")[2] for n, p in streamed.model.named_parameters() if p.device.type != "meta"}
        held.append(here == {str(sublayer.block)})

    evaluator.walk(visit)
    assert len(held) == 12
    assert all(held)


WORKER = r"""
import json
import re
import sys
from pathlib import Path

import torch
from pruning.console import Reporter
from pruning.importance import Sampling, metric
from pruning.models.finding import find_model
from pruning.plan import Unit
from pruning.forward.streaming import open_streamed
from pruning.forward.evaluator import Evaluator
from tests.conftest import pico_model

torch.set_num_threads(1)


def memory(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


dense, residency = open_streamed(find_model(sys.argv[1], Reporter()), "float32", "cpu")
ids = torch.tensor(json.loads(sys.argv[2]))
units = [Unit(block, "attention") for block in range(30)]
small = Evaluator(pico_model("llama"), dense.family, ids, 2)  # what libraries take once is not the model's
metric("leave-one-out").load()(small, units[:6], Sampling(), Reporter())
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
evaluator = Evaluator(dense.model, dense.family, ids, 2, residency=residency)
scores = metric("leave-one-out").load()(evaluator, units, Sampling(), Reporter())
print(json.dumps([memory("VmHWM") - before, list(scores.values.values())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_streamed_model_of_30_blocks_needs_less_than_a_third_of_its_memory(tmp_path):
    model = pico_model("llama", num_hidden_layers=30, hidden_size=384, intermediate_size=1536)
    model.save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(1))
    activations = 31 * ids.numel() * 384 * 4
    evaluator = Evaluator(model, FAMILIES["llama"], ids, 2)
    units = [Unit(block, "attention") for block in range(30)]
    whole = metric("leave-one-out").load()(evaluator, units, Sampling(), Reporter()).values
    command = [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(ids.tolist())]
    environment = {**os.environ, "PYTHONPATH": str(Path(pruning.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, streamed = json.loads(done.stdout.splitlines()[-1])
    assert list(whole.values()) == pytest.approx(streamed, abs=1e-5)
    assert peak < (weights + activations) / 3, (peak, weights, activations)
