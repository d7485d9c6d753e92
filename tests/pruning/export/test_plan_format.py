"""Plans as files, and exports that share the dense model's weights."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.errors import CheckpointError, RecipeError
from pruning.export.convert import convert
from pruning.export.writing import state_dict
from pruning.families import FAMILIES, own_window
from pruning.models.applied import apply_plan_file
from pruning.models.checkpoint import Manifest, hash_file, read_manifest, verify
from pruning.models.plan_file import CHAIN_VERSION, PLAN, PlanFile, Raw, read_plan
from pruning.models.weight_files import ADDED, BASE, INDEX
from pruning.recipe import Recipe
from pruning.variants import VARIANTS, variant, window_fit
from tests.conftest import (
    BLOCKS,
    export_windows,
    int8_sibling,
    pico_config,
    pico_model,
    pico_tokenizer,
    planting_sinks,
    run_prune_export,
)

IDS = torch.randint(3, 320, (2, 60), generator=torch.Generator().manual_seed(4))
SLIDING = {"mistral"}  # nothing of it can be limited


def logits(directory: Path, **options) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(directory, **options)(IDS).logits


@pytest.fixture(scope="module", autouse=True)
def planted() -> Iterator[None]:
    with planting_sinks():
        yield


@pytest.fixture(scope="module")
def dense(pico_directory) -> Path:
    return pico_directory("llama")


@pytest.fixture(scope="module")
def plan(dense, text, tmp_path_factory) -> Path:
    return export_windows(dense, tmp_path_factory.mktemp("plan") / "plan", text, format="plan")


@pytest.fixture(scope="module")
def checkpoint(dense, text, tmp_path_factory) -> Path:
    return export_windows(dense, tmp_path_factory.mktemp("checkpoint") / "checkpoint", text)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_directory_of_a_plan_is_small_and_complete(plan):
    assert {path.name for path in plan.iterdir()} >= {PLAN, "pruning.json", "README.md", "report.html"}
    assert not (plan / "config.json").exists()
    assert not (plan / "tokenizer.json").exists()
    assert "prune-serve DENSE --plan DIR" in (plan / "README.md").read_text()
    assert verify(plan).recipe["format"] == "plan"


def test_the_file_says_what_it_is_for(plan, dense):
    document = read_plan(plan / PLAN).document
    config = json.loads((dense / "config.json").read_text())
    assert document.model_type == "llama"
    assert document.shapes == {name: config[name] for name in document.shapes}
    assert set(document.shapes) >= {"num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size"}
    assert len(document.block_configs) == BLOCKS
    assert document.manifest.base["weight_hash"] == read_manifest(plan).base["weight_hash"]
    assert document.manifest.quality["pruned_loss"] > 0


def test_the_file_is_an_ordinary_shard(plan, checkpoint):
    tensors = load_file(plan / PLAN)
    assert tensors.keys() == load_file(checkpoint / ADDED).keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(checkpoint / ADDED).items())
    with safe_open(plan / PLAN, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused(plan, tmp_path, data):
    raw = (plan / PLAN).read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << data.draw(st.integers(0, 7)))]) + raw[at + 1 :])
    with pytest.raises(CheckpointError):
        read_plan(damaged)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused(plan, tmp_path, kept):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((plan / PLAN).read_bytes()[:kept])
    with pytest.raises(CheckpointError):
        read_plan(cut)


def test_a_newer_version_is_named(plan, tmp_path):
    found = read_plan(plan / PLAN)
    newer = tmp_path / "newer.safetensors"
    newer.write_bytes(found.document.model_copy(update={"version": CHAIN_VERSION + 1}).render(found.tensors))
    with pytest.raises(CheckpointError, match=f"plan version {CHAIN_VERSION + 1}"):
        read_plan(newer)


def test_a_plan_that_takes_something_out_is_refused(plan, tmp_path):
    found = read_plan(plan / PLAN)
    blocks = [{kind: {"no_op": True, "emulation": None} for kind in ("attention", "ffn")}] * BLOCKS
    forged = tmp_path / "forged.safetensors"
    forged.write_bytes(found.document.model_copy(update={"block_configs": blocks}).render(found.tensors))
    with pytest.raises(CheckpointError, match=r"takes attention\.0 out"):
        read_plan(forged)


def test_a_plan_cannot_replace_a_tensor_of_the_model(plan, dense, tmp_path):
    found = read_plan(plan / PLAN)
    forged = tmp_path / "forged.safetensors"
    tensors = {**found.tensors, "model.norm.weight": Raw("F32", (128,), bytes(512))}
    forged.write_bytes(found.document.render(tensors))
    with pytest.raises(CheckpointError, match=r"adds model\.norm\.weight"):
        apply_plan_file(str(dense), str(forged), print)


@pytest.mark.embedded
def test_the_embedded_models_plan_is_under_200_kilobytes():
    """SmolLM2-135M with all 30 layers limited: 3 KV heads of 64 numbers, float32, and scores of every sublayer."""
    layers = range(30)
    window = {"no_op": False, "emulation": None, "window": {"size": 1024, "sink": True}}
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in ("sink_key", "sink_value")]
    scores = {f"{kind}.{layer}": 0.123456789012345678 for layer in layers for kind in ("attention", "ffn")}
    manifest = Manifest(
        shoal_version="0", base={}, recipe=Recipe().model_dump(mode="json"), num_blocks=30,
        removed={f"attention.{layer}": "window" for layer in layers},
        importance={"leave-one-out": scores, "leave-one-out, standard error": scores}, quality={}, sizes={}, stages={},
        files={},
    )  # fmt: skip
    blocks = [{"attention": window, "ffn": {"no_op": False, "emulation": None}}] * 30
    document = PlanFile(model_type="llama", shapes={}, block_configs=blocks, manifest=manifest)
    raw = document.render({name: Raw("F32", (3, 64), bytes(3 * 64 * 4)) for name in names})
    assert 30 * 2 * 3 * 64 * 4 < len(raw) < 200_000


@pytest.mark.parametrize(
    "flags",
    [
        ["--emulation", "low-rank"],
        ["--emulation", "none"],
        ["--emulation", "window", "--compensate"],
        ["--emulation", "window", "--recalibrate"],
        ["--emulation", "window", "--blocks", "1"],
        ["--emulation", "window", "--heal", "lora"],
    ],
)
def test_what_changes_weights_is_refused_at_once(flags, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pruning.stages.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert run_prune_export(monkeypatch, dense, "--output", tmp_path / "out", "--format", "plan", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "holds no weights" in error[0]


def test_the_default_emulation_is_refused_with_its_name(dense, tmp_path, text):
    with pytest.raises(RecipeError, match="--emulation low-rank changes some"):
        export_windows(dense, tmp_path / "out", text, format="plan", emulation="low-rank", window=None)


def test_only_windows_and_skipped_ffns_leave_weights_alone():
    assert [name for name in VARIANTS if not variant(name).changes_weights] == ["window", "skip"]


def test_an_export_of_windows_shares_the_dense_files(dense, checkpoint):
    theirs, mine = dense / "model.safetensors", checkpoint / BASE
    assert mine.samefile(theirs)
    assert not mine.is_symlink()
    assert mine.read_bytes() == theirs.read_bytes()
    assert verify(checkpoint).files[BASE] == hash_file(theirs)
    index = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    assert set(index.values()) == {BASE, ADDED}
    assert index.keys() == {*load_file(theirs), *load_file(checkpoint / ADDED)}


@pytest.mark.slow
def test_without_sinks_nothing_is_added(dense, text, tmp_path, monkeypatch):
    bare = [{"none": None}] * BLOCKS
    monkeypatch.setattr(window_fit, "first_tokens", lambda _: bare)
    checkpoint = export_windows(dense, tmp_path / "checkpoint", text)
    plan = export_windows(dense, tmp_path / "plan", text, format="plan")
    assert not (checkpoint / ADDED).exists()
    assert not load_file(plan / PLAN)
    assert torch.equal(logits(apply_plan_file(str(dense), str(plan), print)), logits(checkpoint))


@pytest.mark.slow
def test_exporting_leaves_the_mode_of_the_dense_files(tmp_path, dense, text):
    mine = shutil.copytree(dense, tmp_path / "dense")
    (mine / "model.safetensors").chmod(0o640)
    export_windows(mine, tmp_path / "out", text)
    assert (mine / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.slow
def test_weights_behind_links_are_linked_for_real(tmp_path, dense, text):
    """A snapshot of the hub is a directory of symbolic links."""
    mine = tmp_path / "snapshot"
    mine.mkdir()
    for path in dense.iterdir():
        (mine / path.name).symlink_to(path)
    out = export_windows(mine, tmp_path / "out", text)
    assert (out / BASE).samefile(dense / "model.safetensors")
    assert not (out / BASE).is_symlink()


def test_a_checkpoint_that_shares_its_weights_converts_to_a_plan(checkpoint, plan, dense, pico_checkpoint, tmp_path):
    convert(checkpoint, "plan", tmp_path / "plan", overwrite=False, reporter=Reporter())
    mine, theirs = read_plan(tmp_path / "plan" / PLAN), read_plan(plan / PLAN)
    assert mine.tensors == theirs.tensors
    assert mine.document.block_configs == theirs.document.block_configs
    assert mine.document.manifest.base == theirs.document.manifest.base
    assert torch.equal(logits(apply_plan_file(str(dense), str(tmp_path / "plan"), print)), logits(checkpoint))
    with pytest.raises(CheckpointError, match="cannot become plan: it holds no weights"):
        convert(pico_checkpoint("llama")[0], "plan", tmp_path / "other", overwrite=False, reporter=Reporter())


def test_a_dense_model_is_evaluated_with_a_plan(checkpoint, plan, dense, text, tmp_path, monkeypatch):
    flags = ["--text", text, "--text-tokens", "200", "--window", "50"]
    assert run_prune_export(monkeypatch, "evaluate", dense, "--plan", plan, *flags, "--output", tmp_path / "a") == 0
    assert run_prune_export(monkeypatch, "evaluate", checkpoint, *flags, "--output", tmp_path / "b") == 0
    mine, theirs = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert mine["text"] == theirs["text"]
    assert mine["plan"] == str(plan)


@pytest.mark.slow
def test_where_files_cannot_be_linked_they_are_copied(tmp_path, dense, text, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    out = export_windows(dense, tmp_path / "out", text)
    assert (out / BASE).read_bytes() == (dense / "model.safetensors").read_bytes()
    assert (out / BASE).stat().st_nlink == 1
    verify(out)


@pytest.mark.slow
def test_files_in_shards_keep_their_names(tmp_path, dense, text):
    sharded = tmp_path / "sharded"
    pico_model("llama").save_pretrained(sharded, max_shard_size="200KB")
    pico_tokenizer().save_pretrained(sharded)
    out = export_windows(sharded, tmp_path / "out", text)
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert all((out / name).samefile(sharded / name) for name in shards)
    assert torch.equal(logits(out), logits(export_windows(dense, tmp_path / "single", text)))


@pytest.mark.slow
def test_each_file_is_hashed_once(tmp_path, dense, text, monkeypatch):
    hashed = []

    def counting(path: Path) -> str:
        hashed.append(path.resolve().name)
        return hash_file(path)

    monkeypatch.setattr("pruning.models.checkpoint.hash_file", counting)
    export_windows(dense, tmp_path / "out", text)
    assert hashed.count("model.safetensors") + hashed.count(BASE) == 1


@pytest.mark.slow
def test_half_precision_weights_stay_in_their_dtype_unless_asked_otherwise(tmp_path, text):
    half = tmp_path / "half"
    pico_model("llama").to(torch.bfloat16).save_pretrained(half)
    pico_tokenizer().save_pretrained(half)
    out = export_windows(half, tmp_path / "out", text)
    assert (out / BASE).samefile(half / "model.safetensors")
    manifest = verify(out)
    assert manifest.base["dtype"] == "bfloat16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    config = pico_config("llama")
    assert manifest.sizes["kv_per_token_dense"] == BLOCKS * 2 * config.num_key_value_heads * config.head_dim * 2
    assert manifest.sizes["weights"] == sum(
        tensor.nbytes for name in (BASE, ADDED) for tensor in load_file(out / name).values()
    )
    asked = export_windows(half, tmp_path / "asked", text, dtype="float32")
    assert not (asked / BASE).exists()
    assert {tensor.dtype for tensor in load_file(asked / "model.safetensors").values()} == {torch.float32}
    torch.testing.assert_close(logits(out, dtype=torch.float32), logits(asked), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - SLIDING))
def test_checkpoint_and_plan_of_every_family_hold_the_same_model(model_type, pico_directory, tmp_path, text):
    dense, config = pico_directory(model_type), pico_config(model_type)
    free = sum(own_window(config, block) is None for block in range(BLOCKS))
    recipe = {"attention": min(3, free), "keep": [b for b in range(BLOCKS) if own_window(config, b) is not None]}
    checkpoint = export_windows(dense, tmp_path / "checkpoint", text, **recipe)
    convert(checkpoint, "plan", tmp_path / "plan", overwrite=False, reporter=Reporter())
    applied = apply_plan_file(str(dense), str(tmp_path / "plan"), print)
    assert (checkpoint / BASE).samefile(dense / "model.safetensors")
    found = logits(checkpoint)
    assert torch.equal(logits(applied), found)
    assert not torch.equal(logits(dense), found)
    names = set(load_file(checkpoint / BASE)) | set(load_file(checkpoint / ADDED))
    assert set(state_dict(AutoModelForCausalLM.from_pretrained(checkpoint))) == names


def test_a_plan_chosen_on_int8_weights_is_for_these_and_for_the_shapes_of_its_siblings(
    pico_directory, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dense = pico_directory("llama")
    small = int8_sibling(dense, tmp_path / "int8")
    plan = export_windows(small, tmp_path / "plan", text, format="plan")
    assert "is quantised (compressed-tensors)" in capsys.readouterr().err
    manifest = read_plan(plan / PLAN).document.manifest
    assert manifest.base["quantisation"] == "compressed-tensors"
    assert manifest.quality["dense_loss"] > 0
    notes: list[str] = []
    apply_plan_file(str(small), str(plan), notes.append)
    assert notes == []
    apply_plan_file(str(dense), str(plan), notes.append)
    assert "only shapes were checked" in notes[0]
    tensors = load_file(small / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="other weights"):
        apply_plan_file(str(small), str(plan), notes.append)
