"""One small healing in a process of its own: `healing_run.py RESULT [STATE [DIE_AT_STEP]]`, also under torchrun."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[3]))

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward import parallel
from pruning.forward.evaluator import Evaluator
from pruning.plan import Plan, Sublayer
from pruning.recovery.emulation import Recovery, recover
from pruning.recovery.healing import heal
from pruning.recovery.training import Settings
from tests.conftest import pico_model, tokens

PLAN = Plan(6, {Sublayer(2, "attention"): "low_rank", Sublayer(4, "ffn"): "bias"}, rank=4)
SETTINGS = Settings(
    trained="lora", loss="kl", optimizer="adamw", learning_rate=2e-3, lora_rank=2, steps=10, minutes=None,
    batch_tokens=192, precision="no", seed=0,
)  # fmt: skip


class DyingReporter(Reporter):
    """Kills the process, as `kill -9` does, when a step is reported."""

    die_at = 0

    def say(self, text: str) -> None:
        if f"step {self.die_at} " in text:
            os.kill(os.getpid(), signal.SIGKILL)


def tensors_of(recovery: Recovery) -> dict[str, torch.Tensor]:
    """All that a recovery holds, by name."""
    adapters = {s: module.state_dict() for s, module in recovery.emulations.items() if module is not None}
    return {**recovery.weights, **{f"{s}.{n}": t for s, held in adapters.items() for n, t in held.items()}}


def run(state: Path | None, reporter: Reporter) -> tuple[Recovery, dict]:
    """The same request every time."""
    torch.set_num_threads(1)
    model, family = pico_model("llama"), FAMILIES["llama"]
    recovery = recover(Evaluator(model, family, tokens()), PLAN.removed, PLAN.rank, Reporter(), compensated=False)
    return heal(model, family, PLAN, recovery, tokens(21, seed=3), tokens(4, seed=4), SETTINGS, reporter, state=state)


if __name__ == "__main__":
    parallel.start()
    reporter = DyingReporter()
    reporter.die_at = int(sys.argv[3]) if len(sys.argv) > 3 else -1
    result, _ = run(Path(sys.argv[2]) if len(sys.argv) > 2 else None, reporter)
    if parallel.process()[0] == 0:
        save_file(tensors_of(result), sys.argv[1])
