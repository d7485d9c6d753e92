"""Plans fitted together get the emulations each would get alone, and what they share is fitted once."""

import pytest
import torch

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.plan import Sublayer
from pruning.recovery import fitting
from pruning.recovery.emulation import fit_plan
from pruning.recovery.fitting import fit_plans, together
from tests.conftest import tokens


def attention(*blocks, kind="low_rank"):
    return {Sublayer(block, "attention"): kind for block in blocks}


PLANS = [
    {},
    attention(1),
    attention(1, 4),
    attention(1, 3, 4),
    attention(3, 4),
    attention(1, 4, kind="context"),
    attention(3, 4, kind="context"),
    {Sublayer(1, "ffn"): "bias", **attention(2, kind="none"), Sublayer(5, "ffn"): "linear"},
    {**attention(1), Sublayer(1, "ffn"): "low_rank"},
]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "cohere"])
def test_each_plan_is_fitted_as_alone(pico, model_type):
    model = pico(model_type)
    evaluator = Evaluator(model, FAMILIES[model_type], tokens(rows=6), batch_size=2)
    found = fit_plans(evaluator, PLANS, 4, Reporter())
    assert found[0] == {}
    for plan, mine in zip(PLANS[1:], found[1:], strict=True):
        alone = fit_plan(evaluator, plan, 4, Reporter())
        assert mine.keys() == alone.keys()
        for sublayer, module in alone.items():
            if module is None:
                assert mine[sublayer] is None
                continue
            for name, tensor in module.state_dict().items():
                assert torch.equal(mine[sublayer].state_dict()[name], tensor), (plan, sublayer, name)


def test_what_plans_share_is_fitted_once(pico, monkeypatch):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens(rows=2))
    calls = []
    fit = fitting.fit
    monkeypatch.setattr(fitting, "fit", lambda *arguments: calls.append(str(arguments[1].sublayer)) or fit(*arguments))
    nested = [attention(5), attention(1, 5), attention(1, 3, 5)]
    found = fit_plans(evaluator, nested, 4, Reporter())
    assert calls == ["attention.1", "attention.3", *["attention.5"] * 3]
    first = Sublayer(1, "attention")
    assert found[1][first] is found[2][first]


def test_groups_hold_neighbours_and_every_plan(pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens(rows=2))
    plans = [attention(0, 1), attention(4), attention(0, 1, 2), attention(4, 5)]
    assert together(evaluator, plans, 2) == [[0, 2], [1, 3]]
    evaluator.state_bytes = 1
    assert together(evaluator, plans, 2) == [[0], [2], [1], [3]]
