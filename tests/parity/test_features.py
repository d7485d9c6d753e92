"""What must keep working in vLLM on a pruned model, against transformers; all in one engine process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import engine_environment, pico_tokenizer, rewrite_manifest

PROMPT = torch.randint(3, 259, (100,), generator=torch.Generator().manual_seed(7)).tolist()
REGEX = "(yes|no) [0-9]{3}"
LORA_MODULES = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]

BLOCK_TOKENS = 128  # of vLLM's KV cache on a CPU


def sharded(source: Path, target: Path) -> Path:
    """The checkpoint in several files, with a tokenizer."""
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size="300KB")
    pico_tokenizer().save_pretrained(target)
    shutil.copyfile(source / "pruning.json", target / "pruning.json")
    rewrite_manifest(target)
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def quantised(source: Path, target: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint as llm-compressor writes W8A8 (`int-quantized`), and its tensors as float again.

    Weights by channel and activations by token, symmetric; the output projection and the adapters stay as they are.
    """
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    stored, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight") or ".emulation." in name:
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        stored[name.removesuffix("weight") + "weight_scale"] = scale
        plain[name] = stored[name].float() * scale
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    side = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*emulation.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": side | {"strategy": "channel", "dynamic": False},
                "input_activations": side | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    rewrite_manifest(target)
    return target, plain


def adapter(source: Path, target: Path) -> peft.PeftModel:
    """A LoRA adapter on the pruned model, as PEFT saves it."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LORA_MODULES, init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data *= 0.2
    model.save_pretrained(target)
    return model


@pytest.fixture(scope="module")
def made(pico_checkpoint, pico_directory, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("features")
    source = pico_checkpoint("llama kv-share")[0]
    quantised_directory, plain = quantised(source, root / "w8a8")
    return {
        "source": source,
        "sharded": sharded(source, root / "sharded"),
        "quantised": quantised_directory,
        "plain": plain,
        "adapted": adapter(source, root / "adapter"),
        "adapter": root / "adapter",
        "dummies": {
            "dense llama": _config_only(pico_directory("llama"), root / "dense"),
            "pruned llama": _config_only(source, root / "pruned"),
        },
    }


def _config_only(source: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    return target


@pytest.fixture(scope="module")
def shown(made) -> dict:
    job = {
        "sharded": str(made["sharded"]),
        "quantised": str(made["quantised"]),
        "adapter": str(made["adapter"]),
        "dummies": {name: str(directory) for name, directory in made["dummies"].items()},
        "prompt": PROMPT,
        "regex": REGEX,
    }
    command = [sys.executable, str(Path(__file__).with_name("features.py")), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=engine_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    return json.loads(line)


def log_softmax(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT + tokens])).logits[0].float().log_softmax(-1)


def prompt_logprobs(model) -> torch.Tensor:
    rows = log_softmax(model, [])[:-1]
    return rows[range(len(rows)), PROMPT[1:]]


@pytest.mark.engine
def test_a_chunked_prefill_from_a_sharded_checkpoint_agrees_with_transformers(made, shown):
    model = AutoModelForCausalLM.from_pretrained(made["source"])
    first = shown["served"]["first"]
    rows = log_softmax(model, first["tokens"])[len(PROMPT) - 1 : -1]
    assert rows.argmax(-1).tolist() == first["tokens"]
    assert (rows.topk(3).values - torch.tensor(first["top"])).abs().max() < 1e-3
    assert (prompt_logprobs(model) - torch.tensor(shown["served"]["plain"]["prompt"])).abs().max() < 1e-3


@pytest.mark.engine
def test_the_prefix_cache_is_used_and_changes_nothing(shown):
    first, second = shown["served"]["first"], shown["served"]["second"]
    assert (first["cached"], second["cached"]) == (0, 96)  # whole blocks of 32
    assert second["tokens"] == first["tokens"]


@pytest.mark.engine
def test_a_lora_adapter_gives_what_the_merged_model_gives(made, shown):
    merged = made["adapted"].merge_and_unload()
    expected = prompt_logprobs(merged)
    assert (expected - torch.tensor(shown["served"]["lora"]["prompt"])).abs().max() < 1e-3
    assert (expected - torch.tensor(shown["served"]["plain"]["prompt"])).abs().max() > 1e-2
    tokens = shown["served"]["lora"]["tokens"]
    assert log_softmax(merged, tokens)[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.engine
def test_structured_output_has_its_structure(shown):
    import re

    assert re.fullmatch(REGEX, shown["served"]["structured"])


@pytest.mark.engine
def test_embeddings_are_not_offered(shown):
    assert "generate" in shown["served"]["tasks"]
    assert "embed" not in shown["served"]["tasks"]
    assert "only supported for pooling models" in shown["served"]["embed"]


@pytest.mark.engine
def test_int8_weights_and_activations_stay_near_the_same_weights_in_float(made, shown):
    model = AutoModelForCausalLM.from_pretrained(made["source"])
    model.load_state_dict(made["plain"], strict=True)
    distance = (prompt_logprobs(model) - torch.tensor(shown["quantised"]["prompt"])).abs()
    assert distance.mean() < 0.05  # activations are rounded to 8 bits
    blocks = {tuple(name.split(".")[2:4]) for name in shown["quantised"]["int8"]}
    assert blocks == {("1", "self_attn"), ("4", "self_attn"), ("0", "mlp"), ("4", "mlp")}


@pytest.mark.engine
def test_only_kept_attention_layers_take_cache_also_with_dummy_weights(shown):
    # Not Gemma 3: with hybrid groups a pool's blocks are not tokens of every layer.
    dense, pruned = shown["kv_tokens"]["dense llama"], shown["kv_tokens"]["pruned llama"]
    assert 3 * dense <= pruned < 3 * (dense + BLOCK_TOKENS)  # 2 of 6 attention layers are kept; pools are whole blocks
