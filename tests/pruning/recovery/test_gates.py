"""Gates within a budget: at every temperature, in their gradient, hard in the end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.recovery.gates import BudgetedGates
from pruning.recovery.prune_aware import GATED, HARD, SOFT, TRAVEL, Annealing

LENGTH = st.integers(2, 12)


@given(st.data(), LENGTH, st.floats(0.02, 1.0), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_the_budget_holds_at_every_temperature(data, count, temperature, part):
    scores = torch.tensor(data.draw(st.lists(st.floats(-6, 6), min_size=count, max_size=count))).double()
    costs = torch.tensor(data.draw(st.lists(st.floats(0.2, 3), min_size=count, max_size=count))).double()
    gates = BudgetedGates(scores, costs, part * float(costs.sum()))
    gates.temperature = temperature
    found = gates().detach()
    assert float((found * costs).sum()) == pytest.approx(gates.capacity, rel=1e-6)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert found[scores.argsort()].diff().min() >= 0


def test_cold_gates_are_hard_but_for_one():
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    scores, costs = order.double() / 10, torch.full((40,), 0.75)
    gates = BudgetedGates(scores, costs, 10.5 * 0.75)
    gates.temperature = HARD / 2
    found = gates().detach()
    best = scores.argsort(descending=True)
    assert (found[best[:10]] > 0.999).all()
    assert (found[best[11:]] < 0.001).all()
    assert float(found[best[10]]) == pytest.approx(0.5, abs=1e-2)


def test_the_gradient_keeps_to_the_budget():
    scores, costs = torch.tensor([0.3, -0.2, 1.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    gates = BudgetedGates(scores, costs, 1.7)
    jacobian = torch.stack(
        [torch.autograd.grad(gates()[number], gates.change)[0] for number in range(3)]
    )  # of gate by score
    torch.testing.assert_close(costs.float() @ jacobian, torch.zeros(3), atol=1e-6, rtol=0)
    for number in range(3):
        moved = BudgetedGates(scores + 1e-5 * torch.eye(3)[number], costs, 1.7)
        torch.testing.assert_close(
            jacobian[:, number], ((moved().detach() - gates().detach()) / 1e-5).float(), atol=1e-4, rtol=0
        )


def test_gates_without_a_choice_are_all_open_or_all_shut():
    scores, costs = torch.zeros(3), torch.ones(3)
    assert BudgetedGates(scores, costs, 3.0)().tolist() == [1, 1, 1]
    assert BudgetedGates(scores, costs, 0.0)().tolist() == [0, 0, 0]


def test_gates_grow_cold_and_move_as_far_by_many_steps_as_by_few():
    ends = []
    for steps in (4, 40):
        gates = BudgetedGates(torch.zeros(4), torch.ones(4), 2.0)
        guide = Annealing(gates, GATED)
        temperatures = []
        for number in range(steps):
            share, now = GATED * number / steps, GATED * (number + 1) / steps
            guide.before(share)
            temperatures.append(gates.temperature)
            gates.change.grad = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 1e-4
            guide.after(share, now)
        assert temperatures == sorted(temperatures, reverse=True)
        assert temperatures[0] == SOFT
        assert temperatures[-1] < SOFT * (HARD / SOFT) ** 0.7
        ends.append(gates.change.tolist())
    assert ends[0] == pytest.approx([-TRAVEL, TRAVEL, -TRAVEL, TRAVEL], rel=1e-5)
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


def test_a_gradient_that_is_no_number_moves_nothing():
    gates = BudgetedGates(torch.zeros(2), torch.ones(2), 1.0)
    gates.change.grad = torch.tensor([float("inf"), 1.0])
    Annealing(gates, GATED).after(0.0, 0.1)
    assert gates.change.tolist() == [0, 0]
    assert gates.change.grad is None
