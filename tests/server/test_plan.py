"""`prune-serve DENSE --plan FILE`: what is put together, what is refused, and how fast."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning.errors import ShoalError
from pruning.models import applied as module
from pruning.models.applied import apply_plan_file
from pruning.models.checkpoint import read_manifest
from pruning.models.plan_file import PLAN
from pruning.models.weight_files import ADDED, BASE, INDEX
from pruning.workdir import atomic_directory
from server import cli
from server.engine.compat import EngineFacts
from server.inventory import take_inventory
from server.settings import Settings

FACTS = EngineFacts(1000, 6, 2, 32, 2, 4, 8, 256)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dense(pico_directory, tmp_path) -> Path:
    return shutil.copytree(pico_directory("llama"), tmp_path / "dense")


@pytest.fixture
def plan(pico_plan, tmp_path) -> Path:
    return shutil.copytree(pico_plan("llama")[0], tmp_path / "plan")


@pytest.fixture
def notes() -> list[str]:
    return []


def test_the_directory_holds_links_and_what_the_plan_adds(dense, plan, notes):
    made = apply_plan_file(str(dense), str(plan), notes.append)
    assert made.parent.parent.name == "shoal"
    assert (made / BASE).is_symlink()
    assert (made / BASE).samefile(dense / "model.safetensors")
    assert (made / "tokenizer.json").samefile(dense / "tokenizer.json")
    assert (made / ADDED).read_bytes() == (plan / PLAN).read_bytes()
    assert set(json.loads((made / INDEX).read_text())["weight_map"].values()) == {BASE, ADDED}
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "depth_pruned_llama"
    assert sum("window" in block["attention"] for block in config["block_configs"]) == 3
    assert notes == []


def test_the_inventory_and_the_manifest_are_those_of_the_checkpoint(dense, plan, pico_plan, notes):
    made, checkpoint = apply_plan_file(str(dense), str(plan), notes.append), pico_plan("llama")[1]
    found, expected = read_manifest(made), read_manifest(checkpoint)
    assert (found.removed, found.sizes, found.quality) == (expected.removed, expected.sizes, expected.quality)
    assert take_inventory(made, found, FACTS) == take_inventory(checkpoint, expected, FACTS)


def test_it_is_used_again_and_made_again_where_it_was_damaged(dense, plan, notes, monkeypatch):
    count = []

    def counting(target: Path):
        count.append(target)
        return atomic_directory(target)

    monkeypatch.setattr(module, "atomic_directory", counting)
    first = apply_plan_file(str(dense), str(plan), notes.append)
    assert apply_plan_file(str(dense), str(plan / PLAN), notes.append) == first
    assert len(count) == 1
    (first / "config.json").write_text("{}")
    assert apply_plan_file(str(dense), str(plan), notes.append) == first
    (first / BASE).unlink()
    assert apply_plan_file(str(dense), str(plan), notes.append) == first
    assert len(count) == 3
    assert (first / BASE).samefile(dense / "model.safetensors")
    assert len(list(first.parent.iterdir())) == 1


def test_the_modes_of_the_dense_files_stay(dense, plan, notes):
    (dense / "model.safetensors").chmod(0o640)
    apply_plan_file(str(dense), str(plan), notes.append)
    assert (dense / "model.safetensors").stat().st_mode & 0o777 == 0o640


def quantised(dense: Path) -> None:
    """Make a directory look like a quantised sibling: other tensors, and a configuration that says so."""
    tensors = load_file(dense / "model.safetensors")
    changed = {f"{name}_packed": (tensor * 100).to(torch.int8) for name, tensor in tensors.items()}
    save_file(changed, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (dense / "config.json").write_text(json.dumps(config))


def test_of_a_quantised_sibling_only_shapes_are_checked_and_that_is_said(dense, plan, notes):
    quantised(dense)
    made = apply_plan_file(str(dense), str(plan), notes.append)
    assert len(notes) == 1
    assert "only shapes were checked" in notes[0]
    assert json.loads((made / "config.json").read_text())["quantization_config"] == {"quant_method": "awq", "bits": 4}
    sizes = read_manifest(made).sizes
    assert sizes["weights_dense"] == sum(t.nbytes for t in load_file(dense / "model.safetensors").values())


def test_a_configuration_of_long_ago_is_completed_by_its_class(dense, plan, notes):
    config = json.loads((dense / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShoalError, match="num_key_value_heads 2"):
        apply_plan_file(str(dense), str(plan), notes.append)


def edit(dense: Path, **fields: object) -> None:
    config = json.loads((dense / "config.json").read_text()) | fields
    (dense / "config.json").write_text(json.dumps(config))


def other_weights(dense: Path, plan: Path) -> None:
    raw = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def other_family(dense: Path, plan: Path) -> None:
    edit(dense, model_type="qwen2")


def no_family(dense: Path, plan: Path) -> None:
    (dense / "config.json").write_text("{}")


def other_layers(dense: Path, plan: Path) -> None:
    edit(dense, num_hidden_layers=7)


def other_shape_and_quantised(dense: Path, plan: Path) -> None:
    quantised(dense)
    edit(dense, head_dim=64)


def cut(dense: Path, plan: Path) -> None:
    (plan / PLAN).write_bytes((plan / PLAN).read_bytes()[:-1])


def flipped(dense: Path, plan: Path) -> None:
    raw = (plan / PLAN).read_bytes()
    (plan / PLAN).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def other_file(dense: Path, plan: Path) -> None:
    shutil.copyfile(dense / "model.safetensors", plan / PLAN)


def empty(dense: Path, plan: Path) -> None:
    (plan / PLAN).unlink()


def no_weights(dense: Path, plan: Path) -> None:
    (dense / "model.safetensors").unlink()


def no_configuration(dense: Path, plan: Path) -> None:
    (dense / "config.json").unlink()


def index_elsewhere(dense: Path, plan: Path) -> None:
    (dense / "model.safetensors").rename(dense / "other.safetensors")
    (dense / INDEX).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


REFUSED = {
    other_weights: "other weights than those of",
    other_family: "is for a model of type llama",
    no_family: "is of type None",
    other_layers: "num_hidden_layers 6",
    other_shape_and_quantised: "head_dim 32",
    cut: "is damaged",
    flipped: "is damaged",
    other_file: "is no plan of prune-export",
    empty: "holds no plan.safetensors",
    no_weights: "has neither model.safetensors nor",
    no_configuration: "has no readable config.json",
    index_elsewhere: "not a plain file name",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_does_not_fit_is_refused(spoil, dense, plan, cache, notes):
    spoil(dense, plan)
    with pytest.raises(ShoalError) as caught:
        apply_plan_file(str(dense), str(plan), notes.append)
    assert REFUSED[spoil] in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (cache / "shoal" / "plans").exists()


@pytest.mark.parametrize("name", ["no/such", "./no/such", "nothing"])
def test_a_plan_that_is_nowhere_is_one_line(name, dense, notes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ShoalError, match="no such plan"):
        apply_plan_file(str(dense), name, notes.append)


def test_plan_and_model_may_come_from_the_hub(dense, plan, notes, monkeypatch):
    asked = []

    def snapshot(name: str, patterns: list[str], otherwise: str) -> Path:
        asked.append(name)
        return {"owner/plan": plan, "owner/dense": dense}[name]

    monkeypatch.setattr("pruning.models.plan_file.snapshot", snapshot)
    monkeypatch.setattr("pruning.models.applied.snapshot", snapshot)
    made = apply_plan_file("owner/dense", "owner/plan", notes.append)
    assert asked == ["owner/plan", "owner/dense"]
    assert made.name.startswith("dense-")


def test_the_server_hands_vllm_the_directory_and_keeps_the_name(dense, plan, monkeypatch):
    monkeypatch.delenv("SHOAL_SKIP_VERIFICATION", raising=False)
    settings = Settings(plan=str(plan))
    made = Path(cli._check(str(dense), settings))
    assert (made / ADDED).is_file()
    assert os.environ.pop("SHOAL_SKIP_VERIFICATION") == "1"
    assert cli._defaults(str(dense), settings)["served_model_name"] == ["dense"]


def test_without_verification_other_weights_pass_with_a_note(dense, plan, monkeypatch, capsys):
    monkeypatch.delenv("SHOAL_SKIP_VERIFICATION", raising=False)
    other_weights(dense, plan)
    cli._check(str(dense), Settings(plan=str(plan), skip_verification=True))
    del os.environ["SHOAL_SKIP_VERIFICATION"]
    assert "only shapes were checked" in capsys.readouterr().err


def test_a_plan_alone_cannot_be_served(plan):
    with pytest.raises(ShoalError, match="prune-serve DENSE --plan"):
        cli._check(str(plan), Settings())


@pytest.mark.parametrize("spoil", [other_weights, cut, other_family])
def test_the_command_refuses_in_one_line_before_vllm_is_imported(spoil, dense, plan, tmp_path):
    spoil(dense, plan)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        assert name.partition('.')[0] not in ('vllm', 'torch'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    code = "import sys; sys.argv[0] = 'prune-serve'; from server.cli import main; main()"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(dense), "--plan", str(plan)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
