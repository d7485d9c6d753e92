"""Every metric on real small models."""

import math

import pytest
import torch
from transformers import MambaConfig, StableLmConfig

from pruning.console import Reporter
from pruning.errors import ModelError, RecipeError
from pruning.families import FAMILIES, family_of
from pruning.forward.evaluator import Evaluator
from pruning.forward.gates import with_sublayer_gates
from pruning.importance import METRICS, Sampling, metric
from pruning.importance.activation import angular_runs
from pruning.plan import KINDS, Sublayer, Unit
from pruning.workdir import Journal

EVERY = [Unit(block, kind) for block in range(6) for kind in (*KINDS, "block")]
SUBLAYERS = [unit for unit in EVERY if unit.kind != "block"]
SAMPLING = Sampling(seed=3, samples=2, depth=4)


def tokens(rows=4, length=20):
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def scores(name, evaluator, units=EVERY, sampling=SAMPLING):
    return metric(name).load()(evaluator, units, sampling, Reporter())


@pytest.mark.parametrize("name", [name for name in METRICS if name != "task-shapley"])  # see test_tasks.py
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_every_metric_scores_sublayers_and_blocks_whatever_the_batches(pico, model_type, name):
    model, family = pico(model_type), FAMILIES[model_type]
    found = [scores(name, Evaluator(model, family, tokens(), batch_size=size)) for size in (1, 3)]
    assert list(found[0].values) == EVERY
    assert all(math.isfinite(value) for value in found[0].values.values())
    assert len(set(found[0].values.values())) > len(EVERY) // 2
    for unit in EVERY:
        assert found[0].values[unit] == pytest.approx(found[1].values[unit], abs=2e-4, rel=1e-4)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_is_scored(pico, model_type):
    for name in ("cosine", "leave-one-out", "taylor"):
        found = scores(name, Evaluator(pico(model_type), FAMILIES[model_type], tokens(2)))
        assert all(math.isfinite(value) for value in found.values.values())


def test_distances_equal_the_hidden_states_of_transformers(pico):
    model, ids = pico("llama"), tokens()
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    evaluator = Evaluator(model, FAMILIES["llama"], ids)
    blocks = [Unit(block, "block") for block in range(5)]  # the last state is normed
    x, y = (torch.stack(states[a:b]).double() for a, b in ((0, 5), (1, 6)))
    expected = {
        "l1": (y - x).abs().sum(-1),
        "l2": (y - x).norm(dim=-1),
        "relative-l2": (y - x).norm(dim=-1) / x.norm(dim=-1),
        "cosine": 1 - torch.cosine_similarity(x, y, dim=-1),
        "angular": torch.arccos(torch.cosine_similarity(x, y, dim=-1)) / math.pi,
    }
    for name, values in expected.items():
        found = scores(name, evaluator, blocks).values
        torch.testing.assert_close(
            torch.tensor([found[unit] for unit in blocks], dtype=torch.float64),
            values.mean((1, 2)),
            atol=1e-5,
            rtol=1e-5,
        )
    turn = torch.arccos(torch.cosine_similarity(states[1].double(), states[4].double(), dim=-1)) / math.pi
    assert angular_runs(evaluator, 3, Reporter())[1] == pytest.approx(float(turn.mean()), abs=1e-5)


def test_the_bound_is_at_least_the_norm_and_equal_for_ffns(pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens())
    bound, norm = scores("bip", evaluator).values, scores("l2", evaluator).values
    for unit in EVERY:
        assert (bound[unit] > norm[unit]) if unit.kind == "attention" else bound[unit] == norm[unit]


def test_shapley_values_sum_to_what_removing_everything_costs(pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens(2))
    found = scores("shapley", evaluator, SUBLAYERS, Sampling(samples=3))
    nothing, everything = evaluator.values(
        [{}, dict.fromkeys(s for unit in SUBLAYERS for s in unit.sublayers)]
    ).mean(1).tolist()  # fmt: skip
    assert sum(found.values.values()) == pytest.approx(everything - nothing, abs=1e-9)
    assert all(error > 0 for error in found.errors.values())


def test_path_gradients_sum_to_the_loss_at_the_end_of_the_path(pico):
    evaluator = Evaluator(pico("llama").double(), FAMILIES["llama"], tokens(2))
    depth = 3
    found = scores("aumann-shapley", evaluator, SUBLAYERS, Sampling(samples=6, depth=depth)).values
    share = depth / len(SUBLAYERS)
    hidden, kwargs = evaluator.embed(evaluator.batches[0])
    gates = torch.full((2, 2), 1 - share, dtype=torch.float64)
    with torch.no_grad():
        for index in range(6):
            hidden = with_sublayer_gates(evaluator, index, hidden, kwargs[index], gates, {})
        end = float(evaluator.head_loss(hidden, evaluator.batches[0]).mean())
    increase = end - float(evaluator.loss({}).mean())
    assert share * sum(found.values()) == pytest.approx(increase, rel=1e-3, abs=1e-4)


def test_a_view_scores_the_pruned_model(pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens())
    base = [Sublayer(2, "attention")]
    rest = [Unit(4, "attention"), Unit(5, "ffn")]
    found = scores("leave-one-out", evaluator.view(base), rest).values
    gone = dict.fromkeys(base)
    for unit in rest:
        both = evaluator.loss({**gone, unit.sublayers[0]: None}) - evaluator.loss(gone)
        assert found[unit] == pytest.approx(float(both.mean()), abs=1e-6)


@pytest.mark.parametrize("name", ["leave-one-out", "kl", "shapley"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(pico, tmp_path, name):
    class Killed(Exception):
        pass

    def evaluator(path):
        journal = Journal(path, "model")
        return Evaluator(
            pico("llama"), FAMILIES["llama"], tokens(), batch_size=2, state_bytes=4 * 2 * 20 * 128 * 4, journal=journal
        )

    whole = scores(name, evaluator(None)).values
    path = tmp_path / "journal"
    broken = evaluator(path)
    finals, calls = broken.finals, 0

    def dies(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return finals(*arguments)

    broken.finals = dies
    with pytest.raises(Killed):
        scores(name, broken)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    resumed = evaluator(path)
    kept = len(resumed.journal)
    assert kept >= 1
    assert scores(name, resumed).values == whole
    ran = 0
    again = evaluator(path)
    assert len(again.journal) > kept

    def counted(*arguments):
        nonlocal ran
        ran += 1
        return finals(*arguments)

    again.finals = counted
    assert scores(name, again).values == whole
    assert ran == 0


def test_a_journal_of_another_model_or_text_is_not_read(pico, tmp_path):
    path = tmp_path / "journal"
    first = Evaluator(pico("llama"), FAMILIES["llama"], tokens(), journal=Journal(path, "one"))
    first.loss({})
    other_text = Evaluator(pico("llama"), FAMILIES["llama"], tokens().flip(1), journal=Journal(path, "one"))
    assert not torch.equal(other_text.loss({}), first.loss({}))
    ran = Evaluator(pico("llama"), FAMILIES["llama"], tokens(), journal=Journal(path, "two"))
    assert ran.journal.recall(["loss", [[]], [ran._text(0)]]) is None
    assert first.journal.__class__(path, "one").recall(["loss", [[]], [first._text(0)]]) is not None


def test_names_are_checked():
    with pytest.raises(RecipeError, match="did you mean 'cosine'"):
        metric("cosin")
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        family_of(MambaConfig())
    with pytest.raises(ModelError, match="stablelm models with use_parallel_residual are not supported"):
        family_of(StableLmConfig(use_parallel_residual=True))
    assert all(row.source and row.unit and row.help for row in METRICS.values())
