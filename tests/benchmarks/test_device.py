"""The script for a GPU runs through a window plan on whatever device is there."""

import sys
from pathlib import Path

from pruning.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from device import Clock, differences, plan


def test_a_plan_is_chosen_and_measured_twice_the_same(pico_directory):
    recipe = Recipe(kv_budget="50%", context=256, calibration_tokens=512, held_out_tokens=256)
    one, other = (plan(Path(pico_directory()), recipe, Clock("cpu")) for _ in range(2))
    assert set(one["stages"]) == {"load", "calibrate", "limits", "gates", "measure"}
    assert differences(one, other) == {"scores": 0, "losses": 0, "same_heads": len(one["full_heads"]),
                                       "of": len(one["full_heads"])}  # fmt: skip
