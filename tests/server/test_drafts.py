"""A draft that is not made from the served model is refused in one line, before vLLM is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pruning.errors import UserError
from pruning.models.checkpoint import read_manifest
from server.drafts import check_draft
from server.engine.compat import EngineFacts
from server.inventory import take_inventory
from tests.conftest import name_base


@pytest.fixture
def dense(pico_directory, tmp_path) -> Path:
    return shutil.copytree(pico_directory("llama"), tmp_path / "dense")


@pytest.fixture
def draft(pico_checkpoint, dense, tmp_path) -> Path:
    return name_base(shutil.copytree(pico_checkpoint("llama")[0], tmp_path / "draft"), dense)


def test_a_checkpoint_of_the_model_itself_is_accepted(draft, dense):
    check_draft(draft, str(dense), verified=True)


def test_a_less_pruned_checkpoint_of_the_same_model_may_be_served(draft, dense, tmp_path):
    served = shutil.copytree(draft, tmp_path / "served")
    check_draft(draft, str(served), verified=True)


def test_of_a_hub_id_the_name_is_compared(draft):
    check_draft(draft, "llama", verified=True)
    with pytest.raises(UserError, match="was made from llama, not from owner/other"):
        check_draft(draft, "owner/other", verified=True)


def other_weights(draft: Path, dense: Path) -> None:
    raw = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def other_tokenizer(draft: Path, dense: Path) -> None:
    (dense / "tokenizer.json").write_text((dense / "tokenizer.json").read_text() + "\n")


def no_tokenizer(draft: Path, dense: Path) -> None:
    (dense / "tokenizer.json").unlink()


def other_vocabulary(draft: Path, dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text()) | {"vocab_size": 7}
    (dense / "config.json").write_text(json.dumps(config))


def damaged(draft: Path, dense: Path) -> None:
    raw = (draft / "model.safetensors").read_bytes()
    (draft / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def not_pruned(draft: Path, dense: Path) -> None:
    shutil.rmtree(draft)
    shutil.copytree(dense, draft)


def absent(draft: Path, dense: Path) -> None:
    shutil.rmtree(draft)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "with other weights than those of"),
        (other_tokenizer, "differ in tokenizer.json"),
        (no_tokenizer, "differ in tokenizer.json"),
        (other_vocabulary, "a vocabulary of 320 tokens"),
        (damaged, "does not match its SHA-256"),
        (not_pruned, "is not a checkpoint of prune-export"),
        (absent, "is not a directory"),
    ],
)
def test_another_draft_is_refused(change, message, draft, dense):
    change(draft, dense)
    with pytest.raises(UserError, match=message):
        check_draft(draft, str(dense), verified=True)


def test_a_path_that_vllm_would_misread_is_refused(draft, dense):
    with pytest.raises(UserError, match="'eagle3' in its path"):
        check_draft(draft.rename(draft.with_name("my-eagle3")), str(dense), verified=True)


def test_the_cache_of_a_draft_counts(draft, dense):
    facts = EngineFacts(900, layers=6, kv_heads=2, head_dim=32, kv_tensors=2, kv_dtype_bytes=4, max_running=1,
                        max_model_len=9)  # fmt: skip
    inventory = take_inventory(dense, None, facts, read_manifest(draft))
    assert inventory.kv_bytes_per_token * 6 == inventory.kv_bytes_per_token_dense * (6 + 2)  # the draft keeps 2 of 6
    assert inventory.capacity_tokens_dense == 900 * 8 // 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "engine", "message"),
    [
        (other_weights, [], "with other weights"),
        (None, ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "exclude each other"),
        (None, ["--pipeline-parallel-size", "2"], "--draft does not work with --pipeline-parallel-size"),
    ],
)
def test_the_command_refuses_in_one_line_with_exit_code_2(change, engine, message, draft, dense):
    if change is not None:
        change(draft, dense)
    program = Path(sys.executable).with_name("prune-serve")
    done = subprocess.run(
        [program, dense, "--draft", draft, "--", *engine], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
