"""Masked model = pruned model in memory = exported checkpoint, for every family."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Head
from pruning.models.modeling import AttentionStandIn, blocks_of
from pruning.plan import Sublayer

PROMPT = torch.tensor([[5, 77, 130, 9, 260, 31, 8, 200, 14, 90, 61, 44, 17, 300, 23, 6, 99, 101, 210, 3, 55]])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_masked_dense_model_equals_the_exported_one(model_type, pico, pico_checkpoint):
    directory, pruned = pico_checkpoint(model_type)
    family = FAMILIES[model_type]
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        assert (loaded(PROMPT).logits - pruned(PROMPT).logits).abs().max() == 0

    dense = pico(model_type)
    evaluator = Evaluator(dense, family, PROMPT)
    hidden, kwargs = evaluator.embed(PROMPT)
    stand_ins = iter(blocks_of(pruned, family))
    with torch.inference_mode():
        for index in range(len(evaluator.blocks)):
            if index == 3:  # the whole block is gone
                continue
            block = next(stand_ins)
            gone = {
                kind: module.emulation
                for kind, module in (("attention", block.self_attn), ("ffn", block.mlp))
                if hasattr(module, "emulation")
            }
            hidden = evaluator.run_block(index, hidden, kwargs[index], gone)
        normed = dense.model.norm(hidden)
        masked = torch.cat([tile(normed) for tile in Head(dense, family)._tiles()], -1)
        exported = loaded(PROMPT).logits
    assert (masked - exported).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sublayer_by_sublayer_the_masked_model_has_the_loss_of_the_exported_one(model_type, pico, pico_checkpoint):
    _, pruned = pico_checkpoint(model_type)
    stand_ins = iter(blocks_of(pruned, FAMILIES[model_type]))
    gone = {Sublayer(3, "attention"): None, Sublayer(3, "ffn"): None}
    for index in (0, 1, 2, 4, 5):
        block = next(stand_ins)
        for kind, module in (("attention", block.self_attn), ("ffn", block.mlp)):
            if hasattr(module, "emulation"):
                gone[Sublayer(index, kind)] = module.emulation
    evaluator = Evaluator(pico(model_type), FAMILIES[model_type], PROMPT)
    masked = evaluator.values([gone, {}])[0]  # with the dense model, so that streams of both kinds run together
    logits = pruned(PROMPT).logits[0, :-1]
    exported = torch.nn.functional.cross_entropy(logits, PROMPT[0, 1:]).double()
    torch.testing.assert_close(masked[0], exported, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_generation_without(model_type, cache, pico_checkpoint):
    directory, _ = pico_checkpoint(model_type)
    model = AutoModelForCausalLM.from_pretrained(directory)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = model.generate(PROMPT, use_cache=False, **options)
    cached = model.generate(PROMPT, cache_implementation=cache if cache == "static" else None, **options)
    assert torch.equal(plain, cached)


def test_cache_holds_only_the_kept_attention_layers(pico_checkpoint):
    directory, _ = pico_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    cache = model(PROMPT, use_cache=True).past_key_values
    filled = [layer for layer in cache.layers if layer.keys is not None and layer.keys.numel()]
    kept = [b for b in model.model.layers if not isinstance(b.self_attn, AttentionStandIn)]
    assert len(filled) == len(kept) == 2


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_save_pretrained_round_trips(model_type, pico_checkpoint, tmp_path):
    directory, _ = pico_checkpoint(model_type)
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.block_configs == model.config.block_configs
    with torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, again(PROMPT).logits)


def test_lora_attaches_to_kept_sublayers_only(pico_checkpoint):
    peft = pytest.importorskip("peft")
    directory, _ = pico_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    before = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    names = {name.rsplit(".lora_A", 1)[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert len(names) == 2 + 2  # attention of blocks 1 and 5, FFN of blocks 0 and 5
    with torch.inference_mode():
        assert torch.equal(adapted(PROMPT).logits, before(PROMPT).logits)


@pytest.mark.slow
def test_plain_transformers_refuses_the_checkpoint(pico_checkpoint, tmp_path):
    import subprocess
    import sys

    directory, _ = pico_checkpoint("llama")
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "depth_pruned_llama" in done.stderr
