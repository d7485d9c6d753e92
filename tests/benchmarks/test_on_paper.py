"""The formula of docs/use/scale.md is the one that plans are made with."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from on_paper import CONTEXTS, MODELS, request_bytes, table, tokens_in
from shapes import SHAPES

from pruning.console import Reporter
from pruning.models.finding import find_model
from pruning.models.loading import load_model
from pruning.models.sizes import predicted_bytes
from pruning.plan import Plan, Sublayer, layers_within

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("budget", [0.5, 0.3, 0.2])
def test_the_formula_is_that_of_a_plan(pico_directory, budget):
    dense = load_model(find_model(str(pico_directory("llama")), Reporter()), "float32", "cpu")
    config, context = dense.model.config, 256
    shape = {"head_dim": config.head_dim, "num_hidden_layers": 6, "num_key_value_heads": config.num_key_value_heads}
    heads = [(block, head) for block in range(6) for head in range(config.num_key_value_heads)]
    full = heads[: len(heads) - layers_within(budget, len(heads), 1 / 8)]
    whole = {block for block, _ in full if sum(b == block for b, _ in full) == config.num_key_value_heads}
    mixed = {block: tuple(h for b, h in full if b == block) for block, _ in full if block not in whole}
    limited = {Sublayer(block, "attention"): "window" for block in range(6) if block not in whole}
    sizes = predicted_bytes(dense, Plan(6, limited, 0, 0, context // 8, mixed), context)
    assert request_bytes(shape, budget, context, 4) == sizes["kv_request"]
    assert request_bytes(shape, 1.0, context, 4) == sizes["kv_request_dense"]
    assert sizes["kv_request"] <= budget * sizes["kv_request_dense"]


def test_the_documents_table_is_what_the_command_prints():
    assert table(80) in (ROOT / "docs/use/scale.md").read_text(encoding="utf-8")


def test_an_fp8_cache_holds_twice_as_much_and_a_budget_its_share():
    for name in MODELS:
        for context in CONTEXTS:
            dense = tokens_in(80 * 10**9, SHAPES[name], 1.0, context, 2)
            assert tokens_in(80 * 10**9, SHAPES[name], 1.0, context, 1) == pytest.approx(2 * dense, abs=1)
            assert tokens_in(80 * 10**9, SHAPES[name], 0.5, context, 2) >= 2 * dense
