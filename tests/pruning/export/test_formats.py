"""Export formats hold the same model, convert into each other, and refuse what they cannot hold."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pruning.console import Reporter
from pruning.errors import CheckpointError, RecipeError, StorageError
from pruning.export.convert import convert, read_pruned
from pruning.export.formats import FORMATS, format_named
from pruning.export.writing import write_weights
from pruning.models import checkpoint
from pruning.models.checkpoint import MANIFEST, verify
from pruning.pipeline import run
from pruning.recipe import Recipe
from pruning.request import checked_export

IDS = torch.randint(3, 320, (2, 20), generator=torch.Generator().manual_seed(4))


def export(model, directory, tmp_path, **recipe):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away from it " * 120)
    fixed = {"calibration": [text], "calibration_tokens": 2048, "score_tokens": 256, "sequence_length": 32, "rank": 8}
    asked = checked_export(str(model), Recipe(**fixed, **recipe), directory, overwrite=False, reporter=Reporter())
    run(asked, directory, dry_run=False, reporter=Reporter())
    return directory


@pytest.fixture(scope="module")
def fused(pico_directory, tmp_path_factory):
    """A tiny Llama with 2 of 6 attention layers fused away, as `nemotron-nas`."""
    place = tmp_path_factory.mktemp("fused")
    return export(pico_directory(), place / "out", place, attention=2, fuse=True, format="nemotron-nas")


def logits(directory):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(directory)(IDS).logits


def test_a_fused_model_keeps_block_0_and_holds_no_adapter(fused):
    manifest, config = verify(fused), json.loads((fused / "config.json").read_text())
    assert manifest.recipe["keep"] == [0]
    assert list(manifest.removed.values()) == ["fused", "fused"]
    gone = [index for index, block in enumerate(config["block_configs"]) if block["attention"]["no_op"]]
    assert [f"attention.{index}" for index in gone] == list(manifest.removed)
    sizes = {block["ffn"]["intermediate_size"] for block in config["block_configs"]}
    assert sizes - {192, 200, 208} == set()
    assert len(sizes) > 1
    assert config["mlp_bias"] is True


def test_nemotron_nas_and_shoal_hold_the_same_tensors_and_convert_back_to_the_same_bytes(fused, tmp_path):
    convert(fused, "shoal", tmp_path / "shoal", overwrite=False, reporter=Reporter())
    convert(tmp_path / "shoal", "nemotron-nas", tmp_path / "again", overwrite=False, reporter=Reporter())
    assert logits(tmp_path / "shoal").isfinite().all()
    ours, theirs = read_pruned(tmp_path / "shoal"), read_pruned(tmp_path / "again")
    assert ours.block_configs == theirs.block_configs
    for name in ("config.json", "configuration_decilm.py", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (fused / name).read_bytes()


@pytest.mark.slow
def test_the_configuration_class_travels_with_nemotron_nas_and_needs_none_of_our_code(fused, tmp_path):
    code = (
        "import sys, pickle; from transformers import AutoConfig\n"
        f"c = AutoConfig.from_pretrained({str(fused)!r}, trust_remote_code=True)\n"
        "assert c.model_type == 'nemotron-nas' and c.num_hidden_layers == len(c.block_configs) == 6\n"
        "assert c.block_configs[0].attention.no_op is False and not hasattr(c.block_configs[0].ffn, 'ffn_mult')\n"
        "again = pickle.loads(pickle.dumps(c)); assert again.block_configs[0].attention.no_op is False\n"
        "assert 'pruning' not in sys.modules; c.to_json_string()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr


def test_whole_blocks_make_an_ordinary_llama_that_converts_both_ways(pico_directory, tmp_path):
    directory = export(pico_directory(), tmp_path / "llama", tmp_path, blocks=1, format="llama")
    assert AutoConfig.from_pretrained(directory).model_type == "llama"
    expected = logits(directory)
    for to in ("shoal", "nemotron-nas"):
        convert(directory, to, tmp_path / to, overwrite=False, reporter=Reporter())
    convert(tmp_path / "nemotron-nas", "llama", tmp_path / "back", overwrite=False, reporter=Reporter())
    assert torch.equal(logits(tmp_path / "shoal"), expected)
    assert torch.equal(logits(tmp_path / "back"), expected)


def test_ffns_of_different_sizes_are_padded_for_an_ordinary_llama(pico_directory, tmp_path):
    directory = export(pico_directory(), tmp_path / "shoal", tmp_path, ffn=2, fuse=True)
    sizes = [
        block["ffn"].get("intermediate_size", 192) for block in AutoConfig.from_pretrained(directory).block_configs
    ]
    assert sorted(sizes) == [8, 8, 192, 192, 192, 192]
    convert(directory, "llama", tmp_path / "llama", overwrite=False, reporter=Reporter())
    assert (logits(tmp_path / "llama") - logits(directory)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("nemotron-nas", r"the bias adapter of attention\.0 and 3 more stands in the way; prune again with --fuse"),
        ("llama", r"the bias adapter of attention\.0 and 3 more stands in the way; prune again with --fuse"),
        ("ggml", r"unknown format 'ggml'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(to, reason, pico_checkpoint, tmp_path):
    with pytest.raises((CheckpointError, RecipeError), match=reason):
        convert(pico_checkpoint("llama")[0], to, tmp_path / "out", overwrite=False, reporter=Reporter())
    assert not (tmp_path / "out").exists()


def test_attention_gone_from_a_kept_block_is_no_ordinary_llama(fused, tmp_path):
    with pytest.raises(CheckpointError, match=r"attention\.\d is gone but its block is not"):
        convert(fused, "llama", tmp_path / "out", overwrite=False, reporter=Reporter())
    with pytest.raises(StorageError, match="not empty"):
        convert(fused, "shoal", fused.parent, overwrite=False, reporter=Reporter())


def test_a_family_that_deci_does_not_compute_is_refused(pico_directory, tmp_path):
    directory = export(pico_directory("qwen3"), tmp_path / "qwen3", tmp_path, blocks=1)
    with pytest.raises(CheckpointError, match="Qwen3's differ"):
        convert(directory, "nemotron-nas", tmp_path / "out", overwrite=False, reporter=Reporter())


def test_weights_in_shards_hold_the_same_model_and_are_all_hashed(fused, tmp_path):
    pruned = read_pruned(fused)
    sharded = shutil.copytree(fused, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    written = write_weights(pruned.tensors, sharded, max_shard_size=200_000)
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert written == verify(fused).sizes["weights"]
    checkpoint.write_manifest(sharded, verify(fused))
    assert {*shards, "model.safetensors.index.json"} <= set(verify(sharded).files)
    convert(sharded, "shoal", tmp_path / "one", overwrite=False, reporter=Reporter())
    convert(fused, "shoal", tmp_path / "other", overwrite=False, reporter=Reporter())
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "other"))


def test_a_damaged_checkpoint_is_not_converted(fused, tmp_path):
    damaged = shutil.copytree(fused, tmp_path / "damaged")
    for path in sorted(damaged.iterdir()):
        raw = path.read_bytes()
        middle = len(raw) // 2
        for bad in (raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :], raw[:-1], None):
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.raises(CheckpointError):
                convert(damaged, "shoal", tmp_path / "out", overwrite=False, reporter=Reporter())
        path.write_bytes(raw)
    assert not (tmp_path / "out").exists()
    assert MANIFEST in {path.name for path in damaged.iterdir()}


def test_every_row_of_the_table_resolves():
    for name in FORMATS:
        assert format_named(name).help
