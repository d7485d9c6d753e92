"""KV heads: gates add up, plans hold the budget, exchange makes them cheaper, full heads reach the checkpoint."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning import windows
from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.families import FAMILIES
from pruning.forward.blocks import removed
from pruning.forward.evaluator import Evaluator
from pruning.models.checkpoint import verify
from pruning.plan import Sublayer
from pruning.search import exchange, heads
from pruning.search.selection import Judge
from pruning.variants.window_fit import limits
from pruning.windows.plans import Choice
from tests.conftest import pico_model, run_prune_export, tokens

FREE = range(6)


@pytest.fixture(scope="module")
def trial():
    model = pico_model("llama")
    evaluator = Evaluator(model, FAMILIES["llama"], tokens(4, 64), 2)
    every = [Sublayer(block, "attention") for block in FREE]
    found = {one: each.window for one, each in limits(evaluator, every, 8, Reporter()).items()}
    return exchange.Trial([Judge("text", evaluator)], found, Reporter())


@pytest.fixture(scope="module")
def scores(trial):
    return heads.score(trial.judges, trial.limits, 1, Reporter())[1.0]


def test_scores_of_all_heads_sum_to_what_limiting_all_costs(trial):
    dense, limited = trial.judges[0].evaluator.values([{}, trial.limits]).mean(1).tolist()
    fine = heads.score(trial.judges, trial.limits, 12, Reporter(), reach=1.0)[1.0]
    found = fine.by_judge["text"]
    assert float(found.sum()) == pytest.approx(limited - dense, rel=1e-3)
    assert fine.heads.tolist() == found.clamp_min(0).tolist()
    assert fine.layers.tolist() == found.sum(1).clamp_min(0).tolist()


def test_judges_of_any_scale_count_by_their_weight():
    text, codes = torch.tensor([0.1, 0.3, -1.0]), torch.tensor([9.0, 1.0, 0.0])
    judges = [SimpleNamespace(weight=1.0), SimpleNamespace(weight=2.0)]
    found = heads.weigh(judges, [text, codes], [0.4, 10.0])
    assert found.tolist() == pytest.approx([0.1 + 2 * 0.4 * 0.9, 0.3 + 2 * 0.4 * 0.1, 0.0])
    assert torch.equal(found, heads.weigh(judges, [text, codes * 50], [0.4, 500.0]))


def test_a_gate_that_is_open_or_shut_is_the_plan(trial):
    evaluator, window = trial.judges[0].evaluator, trial.limits[Sublayer(2, "attention")]
    one_full = {Sublayer(2, "attention"): window.with_heads([1])}
    gates = torch.tensor([0.0, 1.0, 1.0, 0.0]).expand(2, -1)  # of each head: full, window
    assert evaluator.loss(one_full).tolist() == pytest.approx(
        evaluator.loss({Sublayer(2, "attention"): window.gated(gates)}).tolist(), abs=1e-6
    )


def test_mixed_layers_compute_in_half_precision(trial):
    model, window = trial.judges[0].evaluator.model, trial.limits[Sublayer(2, "attention")]
    rows = tokens(2, 64)
    with removed(model.model.layers[2], FAMILIES["llama"], "attention", window.with_heads([1])), torch.inference_mode():
        whole = model(rows).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(rows).logits
    assert (half.float() - whole).abs().max() < 0.05 * whole.abs().max()


def test_a_plan_leaves_out_layers_that_keep_all_heads(trial):
    made = heads.limited(trial.limits, frozenset({(0, 0), (0, 1), (3, 1)}))
    assert sorted(each.block for each in made) == [1, 2, 3, 4, 5]
    assert made[Sublayer(3, "attention")].full == (1,)
    assert made[Sublayer(1, "attention")].full == ()


def choice_of(trial, scores, **settings):
    found = windows.Limits(trial.limits, trial.limits)
    every = frozenset(itertools.product(FREE, range(2)))
    usual = {"free": every, "kept": frozenset(), "window": 8, "context": 64, "by": "head"}
    return Choice(scores, found, sizes=lambda share: tuple(scores), **usual | settings)


def test_the_best_are_the_dearest(trial, scores):
    plan = choice_of(trial, {1.0: scores}).plan((5 + 7 / 8) / 12)
    assert len(plan.full) == 5
    rest = set(itertools.product(FREE, range(2))) - plan.full
    assert min(scores.heads[head] for head in plan.full) >= max(scores.heads[head] for head in rest)
    assert {block for block, _ in heads.best_layers(scores, [1, 4], 1)} <= {1, 4}


def test_tensor_parallel_ranks_have_as_many_full_heads_of_a_layer(trial, scores):
    chosen = choice_of(trial, {1.0: scores}, ranks=2).plan((5 + 7 / 8) / 12).full
    assert len(chosen) == 4
    assert {block for block, head in chosen if head == 0} == {block for block, head in chosen if head == 1}
    totals = {block: float(scores.heads[block].sum()) for block in FREE}
    assert {block for block, _ in chosen} == set(sorted(FREE, key=totals.get)[-2:])


def test_no_plan_of_the_same_bytes_costs_less(trial):
    sizes = (0.5, 1.0, 2.0)
    scores = heads.score(trial.judges, trial.limits, 1, Reporter(), sizes=sizes)
    assert (scores[0.5].heads >= scores[1.0].heads).all()
    assert (scores[1.0].heads >= scores[2.0].heads).all()
    choice = choice_of(trial, scores)
    plan = choice.plan(0.19)
    assert choice.share(plan) <= 0.19
    options = {block: heads.options(scores, block, [0, 1]) for block in FREE}
    drawn = random.Random(0)
    for _ in range(2000):
        some = {block: drawn.choice(each) for block, each in options.items()}
        full = frozenset((block, head) for block, (_, _, kept) in some.items() for head in kept)
        other = heads.HeadPlan(full, tuple((block, size) for block, (_, size, _) in some.items() if size != 1))
        if choice.share(other) <= 0.19:
            assert choice.predicted(plan) <= choice.predicted(other) + 1e-6
    with pytest.raises(RecipeError, match=r"6.2% stay with every layer limited"):
        choice.plan(0.05)


def test_smaller_windows_are_scored_on_a_way_of_their_own(trial):
    scores = heads.score(trial.judges, trial.limits, 2, Reporter(), sizes=(0.5, 1.0, 2.0))
    alone = heads.score(trial.judges, heads.resized_by(trial.limits, 0.5), 2, Reporter())[1.0]
    assert torch.equal(scores[0.5].by_judge["text"], alone.by_judge["text"])
    whole = heads.score(trial.judges, trial.limits, 2, Reporter())[1.0]
    assert torch.allclose(scores[1.0].by_judge["text"], whole.by_judge["text"], atol=1e-7)


def test_windows_of_several_sizes_reach_the_checkpoint(monkeypatch, pico_directory, tmp_path):
    text, output = tmp_path / "long.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    options = ["--context", "256", "--kv-budget", "12%", "--calibration", text]
    assert run_prune_export(monkeypatch, pico_directory(), "--output", output, *options) == 0
    manifest = verify(output)
    assert manifest.recipe["window_sizes"] == "auto"
    usual = manifest.recipe["window"]
    entries = [block["attention"] for block in json.loads((output / "config.json").read_text())["block_configs"]]
    kept = sum(
        256 * len(entry["window"].get("full_heads", []))
        + entry["window"]["size"] * (2 - len(entry["window"].get("full_heads", [])))
        if "window" in entry
        else 2 * 256
        for entry in entries
    )
    assert manifest.sizes["kv_request"] * 12 * 256 == manifest.sizes["kv_request_dense"] * kept
    assert kept <= 0.12 * 12 * 256
    own = {
        str(block): entry["window"]["size"] for block, entry in enumerate(entries) if entry["window"]["size"] != usual
    }
    assert manifest.quality.get("windows", {}) == own
    assert set(own.values()) <= {usual // 2, 2 * usual}
    card = (output / "README.md").read_text()
    assert all(f"{block}: {size}" in card for block, size in own.items())
    again = tmp_path / "again"
    assert run_prune_export(
        monkeypatch, output, "--output", again, "--kv-budget", "8%", "--calibration", text, "--context", "256"
    ) in (0, 2)


def test_exchange_swaps_one_head_at_a_time_for_a_cheaper_plan(trial, scores):
    worst = frozenset(sorted(itertools.product(FREE, range(2)), key=lambda head: float(scores.heads[head]))[:3])
    found = exchange.exchange(trial, worst, scores, list(itertools.product(FREE, range(2))))
    before, after = trial.costs([worst, found], "plans")
    assert len(found) == len(worst)
    assert after < before
    again = exchange.exchange(trial, found, scores, list(itertools.product(FREE, range(2))))
    assert trial.costs([again], "plans")[0] <= after


def test_full_heads_reach_the_checkpoint_and_its_figures(monkeypatch, pico_directory, tmp_path):
    text, output = tmp_path / "long.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    options = ["--context", "256", "--kv-budget", "40%", "--window-by", "head", "--window-sizes", "one"]
    options += ["--calibration", text]
    assert run_prune_export(monkeypatch, pico_directory(), "--output", output, *options) == 0
    manifest = verify(output)
    entries = [block["attention"] for block in json.loads((output / "config.json").read_text())["block_configs"]]
    kept = [entry["window"].get("full_heads", []) if "window" in entry else [0, 1] for entry in entries]
    assert sum(map(len, kept)) == 3  # of 12: 3 + 9 / 8 is 34%, and 4 + 8 / 8 would be 42%
    assert manifest.sizes["kv_request"] * 12 * 8 == manifest.sizes["kv_request_dense"] * (3 * 8 + 9)
    mixed = {str(block): some for block, some in enumerate(kept) if len(some) == 1}
    assert manifest.quality.get("full_heads", {}) == mixed
    card = (output / "README.md").read_text()
    assert all(f"{block}.{some[0]}" in card for block, some in mixed.items())
    model = AutoModelForCausalLM.from_pretrained(output)
    for block, heads_kept in enumerate(kept):
        if len(heads_kept) < 2:
            assert list(model.model.layers[block].self_attn.emulation.full) == heads_kept
