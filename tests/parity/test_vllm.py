"""vLLM computes what transformers computes, for every family, from the same checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning.families import FAMILIES
from pruning.plan import Plan, Sublayer
from server.engine import compat as vllm_compat
from server.inventory import tensors
from tests.conftest import BLOCKS, engine_environment, export_pico, pico_model

PROMPTS = [
    [5, 77, 130, 9, 260, 31, 8, 200, 14, 90, 61, 44, 17, 300, 23, 6, 99, 101, 210, 3, 55, 12, 13, 240],
    [250, 4, 9],
]
NEW_TOKENS = 16
NEAR_TIE = 1e-3
MODELS = [*FAMILIES, "llama fused", "qwen2 fused", "llama kv-share", "mistral kv-share", "llama window", "olmo2 window",
          "llama narrow", "gemma2 narrow", "olmo2 narrow", "llama skip", "cohere skip"]  # fmt: skip
SHARED = [f"{name} shared" for name in ("llama", "qwen2", "phi3", "gemma2", "cohere", "olmo2")]
FIRST_STAGE = [(0, "self_attn.o_proj"), (0, "mlp.down_proj"), (1, "mlp.down_proj"), (2, "self_attn.o_proj"),
               (2, "mlp.down_proj")]  # fmt: skip


def run_engine(models: list[Path], variables: dict[str, str] | None = None, **options) -> dict[str, dict]:
    """What vLLM makes of the prompts with each model; one process, with these environment variables, for all."""
    job = {"models": [str(m) for m in models], "prompts": PROMPTS, "max_tokens": NEW_TOKENS, "options": options}
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=engine_environment() | (variables or {}))
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    return {result["model"]: result for result in map(json.loads, lines)}


@pytest.fixture(scope="module")
def served(pico_checkpoint) -> dict[str, dict]:
    return serve_all([*MODELS, *SHARED], pico_checkpoint, distributed_executor_backend="uni")


@pytest.fixture(scope="module")
def served_by_two(pico_checkpoint) -> dict[str, dict]:
    return serve_all(["llama", "qwen2 shared", "llama narrow", "cohere skip"], pico_checkpoint, tensor_parallel_size=2)


def serve_all(models: list[str], pico_checkpoint, **options) -> dict[str, dict]:
    directories = {family: pico_checkpoint(family)[0] for family in models}
    results = run_engine(list(directories.values()), **options)
    return {family: results[str(directory)] for family, directory in directories.items()}


def assert_agreement(served: dict, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    for prompt, logprobs, tokens in zip(PROMPTS, served["prompt_logprobs"], served["tokens"], strict=True):
        ids = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            logits = model(ids).logits[0].float()
        expected = logits[: len(prompt) - 1].log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
        assert (torch.tensor(logprobs) - expected).abs().max() < 1e-3
        chosen = logits[len(prompt) - 1 : -1]
        gap = chosen.max(-1).values - chosen[range(len(tokens)), tokens]
        assert gap.max() < NEAR_TIE


@pytest.mark.engine
@pytest.mark.parametrize("model_type", MODELS)
def test_prompt_logprobs_and_greedy_tokens_agree(model_type, served, pico_checkpoint):
    assert_agreement(served[model_type], pico_checkpoint(model_type)[0])


@pytest.mark.engine
@pytest.mark.parametrize("model_type", MODELS)
def test_the_weights_in_memory_are_those_in_the_files(model_type, served, pico_checkpoint):
    files = sum(
        end - start for start, end in (t["data_offsets"] for t in tensors(pico_checkpoint(model_type)[0]).values())
    )
    assert abs(served[model_type]["weight_bytes"] - files) <= 0.02 * files


@pytest.mark.engine
@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_dense_is_built_for_a_removed_sublayer(model_type, served):
    built = {tuple(name.split(".")[2:4]) for name in served[model_type]["projections"]}
    ffn = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    kept = {"self_attn": [1, 4], ffn: [0, 4]}  # block 3 is gone, so 4 was block 5
    assert built == {(str(block), name) for name, blocks in kept.items() for block in blocks}


@pytest.mark.engine
def test_a_layer_that_reads_anothers_cache_has_none_of_its_own(served):
    assert served["llama kv-share"]["kv_tokens"] == served["llama"]["kv_tokens"]


@pytest.mark.engine
@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_agree_with_transformers_as_ordinary_ones(name, served, pico_checkpoint):
    directory, pruned = pico_checkpoint(name)
    assert_agreement(served[name], directory)
    assert len([one for one in served[name]["projections"] if one.endswith(".o_proj")]) == BLOCKS
    dense = sum(parameter.nbytes for parameter in pico_model(name.partition(" ")[0]).parameters())
    assert abs(served[name]["weight_bytes"] - dense) <= 0.02 * dense
    assert dense > sum(parameter.nbytes for parameter in pruned.parameters())


@pytest.mark.engine
@pytest.mark.parametrize("name", ["qwen2 shared", "llama narrow", "cohere skip"])
def test_two_tensor_parallel_workers_agree_on_other_variants(name, served_by_two, pico_checkpoint):
    assert_agreement(served_by_two[name], pico_checkpoint(name)[0])


@pytest.mark.engine
def test_two_tensor_parallel_workers_agree_with_one(served, served_by_two):
    two = served_by_two["llama"]
    assert two["tokens"] == served["llama"]["tokens"]
    for mine, theirs in zip(two["prompt_logprobs"], served["llama"]["prompt_logprobs"], strict=True):
        assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-4)
    assert two["kv_tokens"] == 2 * served["llama"]["kv_tokens"]


@pytest.mark.engine
def test_two_pipeline_stages_agree_with_transformers_though_one_has_no_attention(tmp_path):
    removed = {
        Sublayer(1, "attention"): "bias",
        Sublayer(3, "attention"): "low_rank",
        Sublayer(4, "attention"): "none",
        Sublayer(4, "ffn"): "low_rank",
        Sublayer(5, "attention"): "bias",
    }
    directory = export_pico(pico_model("llama"), "llama", Plan(BLOCKS, removed, rank=4), tmp_path / "pruned")
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": vllm_compat.TRACED}
    served = run_engine([directory], **options)[str(directory)]
    assert_agreement(served, directory)
    assert served["projections"] == [f"model.layers.{block}.{name}" for block, name in FIRST_STAGE]
