"""A window plan of a model of random weights on one device: that its results are the CPU's, seconds, peak memory.

    python benchmarks/device.py --device cuda --shape llama-3.1-8b --output FILE      # some minutes on one H100
    python benchmarks/device.py --device cpu --shape tiny                             # tries the script itself

First the tiny shape is scored on the CPU and on the device, and the largest differences are printed. Then the shape is
written to a temporary directory and a plan is chosen and measured, loaded as a whole and streamed. Needs no network;
on a CPU `peak` is of the process.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import machine
from shapes import SHAPES, write

from pruning import windows
from pruning.budget import resolved
from pruning.console import Reporter, quiet_libraries
from pruning.models.finding import find_model
from pruning.plan import parse_share
from pruning.recipe import Recipe
from pruning.stages import calibrate, judges_of, opened
from pruning.windows.plans import Choice
from pruning.workdir import Journal


class Clock:
    """Seconds and peak memory of stages, on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.stages = torch.device(device), dict[str, dict[str, float]]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside the `with`."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.stages[name] = {"seconds": round(time.perf_counter() - start, 2), "peak_gib": round(peak / 2**30, 2)}
        print(f"  {name}: {self.stages[name]}", flush=True)


def plan(directory: Path, recipe: Recipe, clock: Clock) -> dict[str, Any]:
    """Choose a window plan and measure it; what it is and what it costs."""
    reporter = Reporter()
    source = find_model(str(directory), reporter)
    recipe = resolved(recipe, source.positions)
    with clock.stage("load"):
        dense = opened(source, recipe)
    with clock.stage("calibrate"):
        tokens, held_out = calibrate(dense, recipe, reporter)
    with clock.stage("limits"):
        found = windows.limited(dense, recipe, tokens, reporter)
    with clock.stage("gates"):
        judges = judges_of(dense, recipe, tokens, Journal(), reporter, found=found)
        choice = Choice.of(dense, recipe, judges, found, reporter)
    chosen = choice.plan(parse_share(recipe.kv_budget or "50%", "kv-budget"))
    measured = windows.Measured(dense, recipe, held_out, Journal(), reporter)
    with clock.stage("measure"):
        losses = [measured.loss({}), measured.loss(choice.limits.by(chosen).served)]
    scores = choice.usual.heads.tolist()
    return {"stages": clock.stages, "losses": losses, "full_heads": sorted(map(list, chosen.full)), "scores": scores}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two devices are apart, and how many full heads they share."""
    scores = (torch.tensor(one["scores"]) - torch.tensor(other["scores"])).abs().max()
    losses = max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
    same = len({*map(tuple, one["full_heads"])} & {*map(tuple, other["full_heads"])})
    return {"scores": float(scores), "losses": losses, "same_heads": same, "of": len(one["full_heads"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--like", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--row", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    companions = find_model(options.like, Reporter()).directory
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    found: dict[str, Any] = {"machine": machine(), "device": options.device, "shape": options.shape}
    if options.device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name(options.device)

    def recipe(device: str, tokens: int, row: int, held: int, **more: Any) -> Recipe:
        fields = {"kv_budget": "50%", "context": 8192, "calibration_tokens": tokens, "sequence_length": row}
        return Recipe(**fields, held_out_tokens=held, device=device, **more)

    with tempfile.TemporaryDirectory() as place:
        small, large = Path(place) / "tiny", Path(place) / options.shape
        write(SHAPES["tiny"], small, companions)
        results = []
        for device in ("cpu", options.device):
            print(f"tiny on {device}:", flush=True)
            results.append(plan(small, recipe(device, 512, 256, 256, codes=0, dtype="float32"), Clock(device)))
        found["against_cpu"] = differences(*results)
        print(found["against_cpu"], flush=True)
        if options.shape != "tiny":
            write(SHAPES[options.shape], large, companions)
        else:
            large = small
        for name, stream in (("whole", False), ("streamed", True)):
            print(f"{options.shape}, {name}:", flush=True)
            asked = recipe(options.device, options.tokens, options.row, options.held_out, dtype=dtype, stream=stream)
            found[name] = plan(large, asked, Clock(options.device))
        found["streamed_against_whole"] = differences(found["streamed"], found["whole"])
        print(found["streamed_against_whole"])
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
