"""Windows with planted sinks: the layer against one written out by hand, caches, padding, checkpoints."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.export.formats import FORMATS, PrunedModel, format_named
from pruning.families import FAMILIES, head_dim, own_window
from pruning.forward.evaluator import Evaluator
from pruning.forward.gates import sublayer_gradients
from pruning.models.modeling import block_configs_of, blocks_of, replace_sublayer
from pruning.plan import Sublayer
from pruning.recovery.emulation import fit_plan
from pruning.variants import variant
from pruning.variants.window import Window
from pruning.variants.window_cache import HeadsLayer
from pruning.variants.window_fit import first_tokens, limits
from tests.conftest import BLOCKS, WINDOW, check_exported_equals_masked, pico_model, tokens, window_plan

CAPPED = {"gemma2": "eager"}  # sdpa leaves the cap of its logits out
Heads = tuple[int, ...]
Sinks = dict[int, tuple[torch.Tensor, torch.Tensor]]


def dense_model(model_type: str) -> PreTrainedModel:
    """A tiny model with at least one layer that sees all tokens."""
    plain = {"sliding_window": None} if model_type == "mistral" else {}
    model = pico_model(model_type, **plain)
    model.set_attn_implementation(CAPPED.get(model_type, "sdpa"))
    return model


def free_layers(model: PreTrainedModel) -> list[int]:
    """Up to three layers that may be limited, the first among them."""
    return [block for block in range(BLOCKS) if own_window(model.config, block) is None][:3]


def random_sinks(model: PreTrainedModel, layers: list[int]) -> Sinks:
    """Constants for each layer."""
    torch.manual_seed(3)
    shape = model.config.num_key_value_heads, head_dim(model.config)
    return {layer: (torch.randn(shape), torch.randn(shape)) for layer in layers}


def limit(
    model: PreTrainedModel, model_type: str, sinks: Sinks, *, size: int = WINDOW, sink: bool = True, full: Heads = ()
) -> None:
    """Limit layers of a model, in place, but for some KV heads of each."""
    family = FAMILIES[model_type]
    for layer, (key, value) in sinks.items():
        window = Window(size, *key.shape, sink, full)
        if sink:
            window.sink_key.data, window.sink_value.data = key.clone(), value.clone()
        window.requires_grad_(False)
        replace_sublayer(blocks_of(model, family)[layer], family, "attention", window)


def by_hand(
    model: PreTrainedModel, ids: torch.Tensor, sinks: Sinks, *, size: int = WINDOW, full: Heads = ()
) -> torch.Tensor:
    """Logits of the dense model with the windows and the planted sinks written out."""

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any, softcap: Any = None, **_: Any):
        place = torch.arange(query.shape[2])
        groups = query.shape[1] // key.shape[1]
        gap = (place[:, None] - place[None]).expand(query.shape[1], -1, -1)
        seen = (gap >= 0) & (gap < (own_window(model.config, module.layer_idx) or 10**6))
        if module.layer_idx in sinks:
            key, value = key.clone(), value.clone()
            for head in set(range(key.shape[1])) - set(full):
                seen[head * groups : (head + 1) * groups] &= gap[0] < size
                key[:, head, size::size], value[:, head, size::size] = (sink[head] for sink in sinks[module.layer_idx])
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        context = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value.repeat_interleave(groups, 1)
        return context.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("by_hand", kernel)
    usual, model.config._attn_implementation = model.config._attn_implementation, "by_hand"
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.config._attn_implementation = usual


def held_tokens(layer: Any) -> list[int]:
    """Tokens that a layer of a cache holds of each KV head."""
    pieces = layer.pieces if isinstance(layer, HeadsLayer) else [(range(layer.keys.shape[1]), layer)]
    held = {head: piece.keys.shape[2] for heads, piece in pieces for head in heads}
    return [held[head] for head in sorted(held)]


@pytest.fixture(params=[(family, full) for family in FAMILIES for full in ((), (1,))], ids=str)
def limited(request) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor, dict[int, Heads]]:
    """A limited model of a family, tokens [2, 61], the logits it has to give, and the full heads of limited layers."""
    family, full = request.param
    model = dense_model(family)
    layers = free_layers(model)
    sinks, ids = random_sinks(model, layers), tokens(2, 61)
    expected = by_hand(model, ids, sinks, full=full)
    limit(model, family, sinks, full=full)
    return model, ids, expected, dict.fromkeys(layers, full)


def test_a_limited_layer_is_what_it_is_by_hand(limited):
    model, ids, expected, _ = limited
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)


def test_a_cache_in_odd_pieces_gives_the_same_and_holds_only_the_window(limited):
    model, ids, expected, layers = limited
    cache, parts = None, []
    for start, end in [(0, 20), *((t, t + 1) for t in range(20, 40)), (40, 47), (47, 60), (60, 61)]:
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)
    for layer, full in layers.items():
        assert held_tokens(cache.layers[layer]) == [61 if head in full else WINDOW for head in (0, 1)]


def test_left_padding_moves_no_sink(limited):
    model, ids, expected, _ = limited
    mask = torch.ones(2, 66, dtype=torch.long)
    mask[0, :5] = 0
    padded = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), ids[0]]), torch.cat([ids[1], ids[1, :5]])])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[0, 5:], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, :61], expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tokens_that_fit_into_the_window_are_read_as_by_the_dense_model(model_type):
    model = dense_model(model_type)
    ids = tokens(2, 50)
    dense = model(ids, use_cache=False).logits
    limit(model, model_type, random_sinks(model, free_layers(model)), size=40)
    limited = model(ids, use_cache=False).logits
    torch.testing.assert_close(limited[:, :40], dense[:, :40], atol=1e-5, rtol=0)
    assert not torch.allclose(limited[:, 40:], dense[:, 40:], atol=1e-3)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"mistral"}))
def test_masked_equals_exported_equals_cached(model_type, pico, pico_checkpoint):
    directory, _ = pico_checkpoint(f"{model_type} window")
    plan, family = window_plan(model_type), FAMILIES[model_type]
    evaluator = Evaluator(pico(model_type), family, tokens())
    emulations = fit_plan(evaluator, plan.removed, plan.rank, Reporter(), plan.sources, plan.window)
    ids = tokens(3, 40, seed=9)
    masked = Evaluator(pico(model_type), family, ids).loss(emulations)
    check_exported_equals_masked(AutoModelForCausalLM.from_pretrained(directory), ids, masked, 2)


def mixed_model() -> PreTrainedModel:
    """A tiny model of which two layers keep one head full, and one is limited whole."""
    model = pico_model("llama")
    sinks = random_sinks(model, [0, 2, 3])
    for full, layers in (((1,), (0, 3)), ((), (2,))):
        limit(model, "llama", {layer: sinks[layer] for layer in layers}, full=full)
    return model


@pytest.mark.parametrize("by_head", [False, True])
def test_generation_in_a_padded_batch_is_that_of_each_prompt_alone(by_head, pico_checkpoint):
    directory, _ = pico_checkpoint("llama window")
    model = mixed_model() if by_head else AutoModelForCausalLM.from_pretrained(directory)
    long, short = tokens(1, 30, seed=4), tokens(1, 19, seed=5)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(ids, **options)[0, -30:] for ids in (long, short)]
    padded = torch.cat([long, torch.cat([torch.zeros(1, 11, dtype=torch.long), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :11] = 0
    together = model.generate(padded, attention_mask=mask, **options)[:, -30:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_beams_guesses_and_static_caches_write_the_same_as_no_cache(how, by_head, pico_checkpoint):
    directory, _ = pico_checkpoint("llama window")
    model = mixed_model() if by_head else AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokens(1, 8, seed=6).repeat(1, 4)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt, use_cache=False, **options | {k: n for k, n in how.items() if k == "num_beams"})
    assert torch.equal(model.generate(prompt, **options, **how), plain)


def test_rows_of_a_cache_of_mixed_layers_can_be_repeated_selected_and_forgotten():
    model, ids = mixed_model(), tokens(2, 20)
    cache = DynamicCache(config=model.config)
    model(ids[:, :19], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    out = model(ids.flip(0)[:, 19:], past_key_values=cache).logits
    torch.testing.assert_close(out, model(ids.flip(0), use_cache=False).logits[:, 19:], atol=1e-5, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


def test_the_checkpoint_names_window_and_sinks(pico_checkpoint):
    directory, model = pico_checkpoint("llama window")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    for index in (0, 1, 2):
        entry = loaded.config.block_configs[index]["attention"]
        assert not entry["no_op"]
        assert entry["window"]["size"] == WINDOW
        if entry["window"]["sink"]:
            assert loaded.state_dict()[f"model.layers.{index}.self_attn.sink_key"].shape == (2, 32)
    assert block_configs_of(loaded, FAMILIES["llama"]) == block_configs_of(model, FAMILIES["llama"])


def test_the_sink_is_what_the_model_caches_of_a_first_token():
    model = pico_model("qwen2")
    evaluator = Evaluator(model, FAMILIES["qwen2"], tokens())
    cache = model(torch.tensor([[model.config.bos_token_id]]), use_cache=True).past_key_values
    for layer, candidates in zip(cache.layers, first_tokens(evaluator), strict=True):
        torch.testing.assert_close(candidates["bos"][0], layer.keys[0, :, 0])
        torch.testing.assert_close(candidates["bos"][1], layer.values[0, :, 0])


def test_the_sink_with_the_least_error_is_taken_and_a_longer_window_errs_less():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens(4, 64))
    wanted = [Sublayer(block, "attention") for block in range(BLOCKS)]
    short, long = (limits(evaluator, wanted, size, Reporter()) for size in (4, 16))
    for sublayer in wanted:
        assert short[sublayer].error == min(short[sublayer].errors.values())
        assert short[sublayer].errors["none"] > long[sublayer].errors["none"] > 0


def test_gates_between_full_and_limited_have_the_gradient_of_finite_differences():
    model = pico_model("llama").double()
    evaluator = Evaluator(model, FAMILIES["llama"], tokens(2, 40))
    layer = Sublayer(2, "attention")
    window = limits(evaluator, [layer], WINDOW, Reporter())[layer].window
    view = evaluator.view([], {layer: window})
    gates, step = torch.ones(BLOCKS, 2), torch.zeros(BLOCKS, 2)
    step[2, 0] = 1
    found = sublayer_gradients(view, gates, 0)[:, 2, 0]
    dense, limited = evaluator.values([{}, {layer: window}])
    half, end = (sublayer_gradients(view, gates - share * step, 0)[:, 2, 0] for share in (0.5, 1.0))
    simpson = (found + 4 * half + end) / 6
    torch.testing.assert_close(dense - limited, simpson, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"shoal", "plan"}))
def test_formats_that_cannot_hold_a_window_say_so(name, pico_checkpoint):
    directory, model = pico_checkpoint("llama window")
    assert "window of attention.0" in format_named(name).refusal(PrunedModel.of(model, FAMILIES["llama"], directory))


def test_a_model_whose_layers_are_all_sliding_is_refused():
    config = pico_model("mistral").config
    with pytest.raises(RecipeError, match="sliding window already"):
        variant("window").check(FAMILIES["mistral"], config)


def test_windows_share_the_dense_weights_in_memory():
    model = pico_model("llama")
    before = copy.copy(dict(model.named_parameters()))
    limit(model, "llama", random_sinks(model, [1]))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {"model.layers.1.self_attn.sink_key", "model.layers.1.self_attn.sink_value"}
