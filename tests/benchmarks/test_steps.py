"""The steps of a load are counted as the scheduler takes them, and costs are found again from a load they made."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("steps", Path(__file__).parents[2] / "benchmarks" / "steps.py")
steps = importlib.util.module_from_spec(spec)
sys.modules["steps"] = steps  # dataclasses look their module up
spec.loader.exec_module(steps)


@pytest.mark.parametrize(
    ("load", "counts"),
    [
        (steps.Load(1, 1, 2000, 64, 512), (63, 0)),  # the last chunk gives the first token
        (steps.Load(2, 1, 2000, 64, 512), (126, 0)),  # one after the other
        (steps.Load(2, 2, 10, 4, 100), (3, 3)),  # both prompts in one step
        (steps.Load(2, 2, 100, 4, 100), (3, 2 + 1)),  # the first writes in both steps that read the second's 100
    ],
)
def test_steps_are_counted(load, counts):
    assert steps.counted(load) == counts


def test_costs_are_found_from_what_a_load_took():
    costs, load = steps.Costs(4.0, 0.07, 0.01), steps.Load(5, 5, 2000, 32, 512)
    found = steps.Costs.of(4.0, 0.07, load, costs.seconds(load))
    assert found.more == pytest.approx(0.01)
    assert steps.Costs.of(4.0, 0.07, steps.Load(1, 1, 10, 2, 100), 9.0).more == 0
