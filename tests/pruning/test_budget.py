"""Tokens that shall fit in a memory, as a share of the KV cache."""

import pytest

from pruning.budget import check, counts, for_target, resolved
from pruning.errors import RecipeError
from pruning.models.checkpoint import verify
from pruning.plan import kv_bytes_of_request, parse_bytes
from pruning.recipe import Recipe
from tests.conftest import run_prune_export as run

LAYERS, LAYER_BYTES, CONTEXT = 30, 1536, 8192


def target(tokens: int, memory: str, **keys: object) -> Recipe:
    return resolved(Recipe(target_tokens=tokens, kv_memory=memory, **keys), CONTEXT)


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 2**34), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("2TB", 2 * 10**12)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "GiB", "0GiB", "-1GiB", "1e3GiB", "16 gib", "0.1B", ""])
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match="is not a size such as 16GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("own", [0.0, 2.5])
@pytest.mark.parametrize("memory", ["500MiB", "1000MiB", "2000MiB"])
def test_the_plan_of_the_budget_holds_the_tokens_and_one_layer_less_would_not(memory, own):
    tokens = 100_000
    recipe = for_target(target(tokens, memory, emulation="window", window=64), LAYER_BYTES, LAYERS, own)
    assert recipe.target_tokens is None
    limited = counts(recipe, LAYERS).attention

    def needed(limited: int) -> float:
        request = kv_bytes_of_request(LAYER_BYTES, LAYERS - limited, {64: limited}, CONTEXT)
        return (request / CONTEXT + own * LAYER_BYTES) * tokens

    assert needed(limited) <= parse_bytes(memory) < needed(limited - 1)


@pytest.mark.parametrize(
    ("keys", "tokens", "memory", "says"),
    [
        ({}, 20_000, "1GiB", "the dense model holds 23,301; nothing needs to go"),
        ({}, 400_000, "1GiB", r"out of reach: 372,827 fit with every layer limited to 512 tokens; give a smaller"),
        ({"emulation": "low-rank"}, 700_000, "1GiB", r"out of reach: 699,036 fit with one attention layer left; give"),
    ],
)
def test_what_needs_nothing_and_what_is_out_of_reach(keys, tokens, memory, says):
    with pytest.raises(RecipeError, match=says):
        for_target(target(tokens, memory, **keys), LAYER_BYTES, LAYERS)


def test_the_ends_of_the_reach_are_inside():
    assert counts(for_target(target(372_827, "1GiB"), LAYER_BYTES, LAYERS), LAYERS).attention == LAYERS
    low_rank = for_target(target(699_036, "1GiB", emulation="low-rank"), LAYER_BYTES, LAYERS)
    assert counts(low_rank, LAYERS).attention == LAYERS - 1
    assert counts(for_target(target(23_302, "1GiB"), LAYER_BYTES, LAYERS), LAYERS).attention == 1


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target_tokens": 5}, "go together"),
        ({"kv_memory": "1GiB"}, "go together"),
        ({"target_tokens": 5, "kv_memory": "1GiB", "kv_budget": "30%"}, "--kv-budget and --target-tokens both say"),
        ({"target_tokens": 5, "kv_memory": "1GiB", "attention": 3}, "--target-tokens and --attention both say"),
        ({"target_tokens": 5, "kv_memory": "much"}, "--kv-memory 'much' is not a size"),
    ],
)
def test_it_contradicts_like_the_other_budgets(keys, says):
    with pytest.raises(RecipeError, match=says):
        check(Recipe(**keys))


def test_from_the_command_line(monkeypatch, capsys, pico_directory, text, tmp_path):
    arguments = [pico_directory(), "--calibration", text, "--calibration-tokens", "256", "--output", tmp_path / "out"]
    assert run(monkeypatch, *arguments, "--target-tokens", "500", "--kv-memory", "1MB") == 0
    assert "500 tokens in 1MB (keys and values in float32): 65.1041% of the KV cache stays" in capsys.readouterr().err
    made = verify(tmp_path / "out")
    assert made.sizes["kv_request_dense"] * 500 / 256 > 1_000_000
    assert made.sizes["kv_request"] * 500 / 256 <= 1_000_000
    assert made.recipe["kv_budget"] == "65.1041%"
