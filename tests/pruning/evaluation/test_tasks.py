"""Multiple-choice tasks as judges, and the trade-off between several."""

import json

import pytest
import torch
from torch.nn import functional

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.evaluation.choice import answer
from pruning.evaluation.questions import Question, holds_questions, parse_task
from pruning.evaluation.tasks import TaskEvaluator, read_task, windows_of
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling, metric
from pruning.plan import Sublayer, Unit
from pruning.search.selection import Judge, score, select, trade_off
from tests.conftest import pico_tokenizer

UNITS = [Unit(block, "attention") for block in range(6)]


def questions(count=6, seed=0):
    letters = torch.randint(97, 122, (count, 3, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Question("letters", str(i), "Which come next?", tuple(f" {bytes(c[: 4 + i % 5]).decode()}" for c in row), i % 3)
        for i, row in enumerate(letters)
    ]


def evaluator(pico, judged="loss", **settings):
    return TaskEvaluator(pico("llama"), FAMILIES["llama"], questions(), pico_tokenizer(), judged, **settings)


def test_answers_equal_those_of_the_multiple_choice_evaluation(pico):
    model, tokenizer = pico("llama"), pico_tokenizer()
    answers = answer(model, tokenizer, questions())
    loss, error = (evaluator(pico, judged).loss({}) for judged in ("loss", "error"))
    for question, given, cost, wrong in zip(questions(), answers, loss, error, strict=True):
        likelihoods = torch.tensor(given.loglikelihoods, dtype=torch.float64)
        expected = functional.cross_entropy(likelihoods[None], torch.tensor([question.label]))
        assert float(cost) == pytest.approx(float(expected), abs=1e-4)
        assert bool(wrong) is not given.correct
    assert 0 < error.sum() < len(error)


def test_only_the_choice_is_counted():
    tokens, counted = windows_of(questions()[0], pico_tokenizer())
    text = pico_tokenizer().decode(tokens[0][1:][counted[0]])
    assert text == questions()[0].choices[0]


@pytest.mark.parametrize("judged", ["loss", "error"])
def test_task_shapley_of_single_removals_is_the_mean_difference(pico, judged):
    judging = evaluator(pico, judged)
    found = metric("task-shapley").load()(judging, UNITS, Sampling(samples=1, depth=1), Reporter()).values
    costs = judging.values([{unit.sublayers[0]: None} for unit in UNITS]).mean(1)
    for number, unit in enumerate(UNITS):
        others = (costs.sum() - costs[number]) / 5
        assert found[unit] == pytest.approx(float(costs[number] - others), abs=1e-6)


def test_task_shapley_without_questions_is_refused(pico):
    text = Evaluator(pico("llama"), FAMILIES["llama"], torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(RecipeError, match="needs --task"):
        metric("task-shapley").load()(text, UNITS, Sampling(), Reporter())


def test_weights_decide_and_the_trade_off_shows_what_each_task_pays(pico):
    text = torch.randint(3, 320, (4, 20), generator=torch.Generator().manual_seed(5))

    def judges(weight):
        return [
            Judge("text", Evaluator(pico("llama"), FAMILIES["llama"], text), 1.0),
            Judge("questions", evaluator(pico), weight),
        ]

    groups, sampling = [(UNITS, 2)], Sampling()
    alone = {}
    for weight in (1e-9, 1e9):
        chosen = select(judges(weight), groups, "leave-one-out", "rank", sampling, Reporter())
        alone[weight] = chosen
    assert alone[1e-9].order != alone[1e9].order
    table = trade_off(judges(1e9), groups, alone[1e9])
    assert table[""] == table["questions"]
    view = judges(1)[0].evaluator
    plan = {s: None for unit in alone[1e-9].order for s in unit.sublayers}
    assert table["text"]["text"] == pytest.approx(float((view.loss(plan) - view.loss({})).mean()), abs=1e-6)


def test_known_scores_spare_the_fits(pico, tmp_path):
    from pruning.workdir import Journal

    fits = []

    def adapters(base):
        fits.append(tuple(base))
        return {}

    def judge():
        text = torch.randint(3, 320, (2, 20), generator=torch.Generator().manual_seed(5))
        journal = Journal(tmp_path / "journal")
        return Judge("t", Evaluator(pico("llama"), FAMILIES["llama"], text, journal=journal), 1.0, adapters, "fit")

    first = score([judge()], UNITS, "leave-one-out", Sampling(), Reporter(), UNITS[3::-1])
    again = score([judge()], UNITS, "leave-one-out", Sampling(), Reporter(), UNITS[3::-1])
    assert first == again
    assert fits == [tuple(Sublayer(block, "attention") for block in (3, 2, 1))]
    score([judge()], UNITS, "leave-one-out", Sampling(), Reporter(), [UNITS[1]])
    assert fits[1:] == [()]


def test_task_files(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"context": "a", "choices": [" b", " c"], "label": 1}] * 100
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert holds_questions(path)
    assert parse_task(f"{path}:2.5") == (path, 2.5)
    assert parse_task(str(path)) == (path, 1.0)
    with pytest.raises(RecipeError, match="over 0"):
        parse_task(f"{path}:0")
    assert len(read_task(path, pico_tokenizer(), 60)) == 10
