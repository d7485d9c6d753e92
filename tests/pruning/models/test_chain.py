"""A checkpoint as the model to prune: pruned further, healed again, written otherwise, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pruning.models.checkpoint import CHAIN_VERSION, FORMAT_VERSION, verify
from tests.conftest import run_prune_export as run

CONTEXT = ["--context", "256", "--window-by", "layer"]
HEADS = ["--context", "256", "--window-by", "head"]
ADAPTERS = ["--emulation", "low-rank", "--rank", "4", "--calibration-tokens", "512", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    return path


@pytest.fixture(scope="module")
def prune(text, tmp_path_factory):
    """Run `prune-export` on a model; the directory that it wrote."""

    def made(model, *flags):
        output = tmp_path_factory.mktemp("chain") / "out"
        with pytest.MonkeyPatch.context() as patch:
            assert run(patch, model, "--output", output, "--calibration", text, *flags) == 0
        return output

    return made


@pytest.fixture(scope="module")
def limited(prune, pico_directory):
    return prune(pico_directory(), "--kv-budget", "60%", *CONTEXT)


@pytest.fixture(scope="module")
def emulated(prune, pico_directory):
    return prune(pico_directory(), "--attention", "2", *ADAPTERS)


def tensors_of(directory):
    return {name: each for path in directory.glob("*.safetensors") for name, each in load_file(path).items()}


def logits(directory):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(directory)(torch.arange(3, 200)[None]).logits


def test_a_smaller_budget_limits_more_layers_and_leaves_those_limited_before(prune, limited, pico_directory):
    first, further = verify(limited), prune(limited, "--kv-budget", "30%", *CONTEXT)
    second = verify(further)
    assert first.removed.items() < second.removed.items()
    assert second.sizes["kv_request"] <= 0.3 * second.sizes["kv_request_dense"]
    assert second.sizes["kv_request_dense"] == first.sizes["kv_request_dense"]
    assert (second.base, second.num_blocks) == (first.base, first.num_blocks)
    assert (first.format_version, second.format_version) == (FORMAT_VERSION, CHAIN_VERSION)
    assert [(step["digest"], step["removed"]) for step in second.chain] == [(first.digest, first.removed)]
    assert second.quality["dense_loss"] == first.quality["dense_loss"]  # of the dense model, not of the checkpoint
    before, after = tensors_of(limited), tensors_of(further)
    assert before.keys() < after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len({path.stat().st_ino for each in (limited, further) for path in each.glob("model-base*")}) == 1
    verify(limited)  # the checkpoint itself is as it was
    assert not torch.equal(logits(limited), logits(further))


def full_heads(directory):
    """Block and head of all KV heads that keep every token."""
    entries = [block["attention"] for block in json.loads((directory / "config.json").read_text())["block_configs"]]
    kept = [entry["window"].get("full_heads", []) if "window" in entry else [0, 1] for entry in entries]
    return {(block, head) for block, heads in enumerate(kept) for head in heads}


def test_a_smaller_budget_limits_more_heads_of_those_that_were_full(prune, pico_directory):
    first = prune(pico_directory(), "--kv-budget", "60%", *HEADS, "--window-sizes", "one")
    second = prune(first, "--kv-budget", "40%", *HEADS)
    assert 4 <= len(full_heads(first)) <= 6  # of 12: 6 + 6 / 8 is 56%, and one whose limit costs nothing is limited too
    assert 1 <= len(full_heads(second)) <= 3
    assert full_heads(second) < full_heads(first)
    healed = prune(second, "--heal", "adapters", "--heal-steps", "2", *HEADS)
    assert full_heads(healed) == full_heads(second)
    assert verify(healed).sizes["kv_request"] == verify(second).sizes["kv_request"]


def test_a_smaller_budget_keeps_the_windows_of_several_sizes_that_there_were(prune, pico_directory):
    first = prune(pico_directory(), "--kv-budget", "45%", *HEADS)
    second = prune(first, "--kv-budget", "25%", *HEADS)
    before, after = windows(first), windows(second)
    assert len(set(before.values())) > 1
    assert before.items() <= after.items()
    assert full_heads(second) < full_heads(first)
    sizes = verify(second).sizes
    assert sizes["kv_request"] <= 0.25 * sizes["kv_request_dense"]
    own = {int(block): size for block, size in verify(second).quality["windows"].items()}
    usual = verify(second).recipe["window"]
    assert own == {block: size for block, size in after.items() if size != usual}


def windows(directory):
    """Block -> positions of its window."""
    entries = [block["attention"] for block in json.loads((directory / "config.json").read_text())["block_configs"]]
    return {block: entry["window"]["size"] for block, entry in enumerate(entries) if "window" in entry}


def test_layers_are_chosen_with_those_limited_before_in_place(prune, limited, text, pico_directory):
    """Nothing but the layers left is a candidate, and what the choice reads is the limited model's loss."""
    further = verify(prune(limited, "--kv-budget", "30%", *CONTEXT))
    scored = {name for table in further.importance.values() for name in table}
    assert not scored & verify(limited).removed.keys()


def test_a_chain_of_three_keeps_all_steps(prune, limited):
    second = prune(limited, "--kv-budget", "40%", *CONTEXT)
    third = verify(prune(second, "--kv-budget", "25%", *CONTEXT))
    assert [step["digest"] for step in third.chain] == [verify(limited).digest, verify(second).digest]


def test_a_checkpoint_with_windows_is_healed_again(prune, limited):
    healed = prune(
        limited,
        "--heal",
        "adapters",
        "--heal-steps",
        "20",
        "--heal-learning-rate",
        "0.03",
        "--heal-loss",
        "next-token",
        *CONTEXT,
    )
    first, second = verify(limited), verify(healed)
    assert second.removed == first.removed
    assert second.sizes == first.sizes
    assert second.quality["healing"]["steps"] == 20
    assert second.quality["healing"]["improved"]
    before, after = tensors_of(limited), tensors_of(healed)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("sink" in name for name in moved)


def test_a_plan_and_other_formats_can_be_made_of_it(monkeypatch, prune, limited, tmp_path):
    plan = prune(limited, "--kv-budget", "30%", "--format", "plan", *CONTEXT)
    assert (plan / "plan.safetensors").stat().st_size < 2**16
    assert len(verify(plan).chain) == 1
    further = prune(limited, "--kv-budget", "30%", *CONTEXT)
    assert run(monkeypatch, "convert", further, "--to", "plan", "--output", tmp_path / "plan") == 0
    assert verify(tmp_path / "plan").chain == verify(further).chain


def test_more_layers_go_from_a_checkpoint_with_adapters(prune, emulated):
    further = prune(emulated, "--attention", "1", *ADAPTERS)
    first, second = verify(emulated), verify(further)
    assert first.removed.items() < second.removed.items()
    assert len(second.removed) == 3
    assert second.sizes["kv_per_token_dense"] == first.sizes["kv_per_token_dense"]
    assert second.sizes["weights_dense"] == first.sizes["weights_dense"]
    left = second.num_blocks - 3
    assert second.sizes["kv_per_token"] * second.num_blocks == second.sizes["kv_per_token_dense"] * left
    assert second.sizes["kv_request"] == second.sizes["kv_per_token"] * second.sizes["context"]
    before, after = tensors_of(emulated), tensors_of(further)
    kept = [name for name in before if "emulation" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert logits(further).isfinite().all()
    assert not torch.equal(logits(emulated), logits(further))


def test_a_budget_counts_against_the_dense_model(prune, emulated):
    """6 layers, 2 gone: half of the dense cache is one more, not half of the four that are left."""
    assert len(verify(prune(emulated, "--kv-budget", "50%", *ADAPTERS)).removed) == 3


def test_sublayers_have_the_numbers_of_the_dense_model(prune, pico_directory):
    first = prune(pico_directory(), "--blocks", "2", "--emulation", "none", "--keep", "0,5", *ADAPTERS[2:])
    second = verify(prune(first, "--attention", "1", "--keep", "0", "1", "2", *ADAPTERS))
    gone = {int(name.split(".")[1]) for name in verify(first).removed}
    assert second.num_blocks == 6
    assert set(second.removed) == {*verify(first).removed, "attention.5"}
    assert 5 not in gone


REFUSED = [
    ("limited", ["--kv-budget", "90%", *CONTEXT], "keeps 5", "already"),
    ("limited", ["--kv-budget", "30%", "--window", "16", *CONTEXT], "--window 16", "leave it out"),
    ("limited", ["--attention", "1", "--emulation", "low-rank"], "has windows", "dense model"),
    ("limited", ["--ffn", "1"], "has windows", "low-rank"),
    ("emulated", ["--heal", "adapters", "--emulation", "low-rank"], "does not hold the dense model", "healing"),
    ("emulated", ["--attention", "4", *ADAPTERS], "4 attention layers left", "one must stay"),
    ("emulated", ["--kv-budget", "80%", *ADAPTERS], "already", "66.7%"),
]


@pytest.mark.parametrize(("which", "flags", "first", "second"), REFUSED)
def test_what_cannot_be_done_to_a_checkpoint_is_refused(
    monkeypatch, request, text, tmp_path, capsys, which, flags, first, second
):
    model, output = request.getfixturevalue(which), tmp_path / "out"
    assert run(monkeypatch, model, "--output", output, "--calibration", text, *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert first in line
    assert second in line
    assert not output.exists()


def test_scores_sweeps_and_damaged_checkpoints_are_refused(monkeypatch, limited, text, tmp_path, capsys):
    assert run(monkeypatch, "score", limited, "--calibration", text) == 2
    assert "pruned already" in capsys.readouterr().err
    assert run(monkeypatch, "sweep", limited, "--attention", "1..2", "--output", tmp_path / "s") == 2
    assert "pruned already" in capsys.readouterr().err


def test_adapters_that_read_other_layers_are_no_base(monkeypatch, prune, pico_directory, text, tmp_path, capsys):
    context = prune(pico_directory(), "--attention", "2", "--emulation", "context", *ADAPTERS[2:], "--keep", "0")
    assert run(monkeypatch, context, "--output", tmp_path / "out", "--attention", "1", *ADAPTERS) == 2
    assert "reads other layers" in capsys.readouterr().err
