"""The training loop: updates on text after the dense model, a budget in steps or in time, the state to resume from."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pruning.console import LOG_INTERVAL_SECONDS, Reporter, duration
from pruning.forward import parallel
from pruning.recovery.distillation import Loss, Teacher, head_gradient, hidden_distance
from pruning.recovery.spam import SPAM
from pruning.recovery.training_state import Carried, TrainingState, carry, load_state, save_state

Trained = Literal["adapters", "lora"]
Optimizer = Literal["adamw", "spam"]
Precision = Literal["no", "bf16", "fp16"]

VALIDATIONS = 10
MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
MAX_GRADIENT_NORM = 1.0
WARMUP, FLOOR = 0.05, 0.05


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        trained: "adapters", or "lora": those and low-rank changes of the kept weights.
        loss: "kl" (dense || pruned), "next-token", or "hidden" (distance of the streams).
        optimizer: "adamw" or "spam".
        learning_rate: Its peak.
        lora_rank: Rank of the changes.
        steps: Updates at most; None: as many as the minutes allow.
        minutes: Time at most; None: as long as the steps take.
        batch_tokens: Tokens in one update, of all processes together.
        precision: Of the forward and backward passes; trained weights are float32 in any case.
        seed: Of the order of windows and of the untrained changes.
    """

    trained: Trained
    loss: Loss
    optimizer: Optimizer
    learning_rate: float
    lora_rank: int
    steps: int | None
    minutes: float | None
    batch_tokens: int
    precision: Precision
    seed: int


@dataclass(frozen=True, slots=True)
class Quality:
    """On the validation windows, nats/token: KL(dense || pruned) and next-token cross-entropy."""

    kl: float
    loss: float

    def better_than(self, other: "Quality", watched: str) -> bool:
        """Lower in what is watched, "kl" or "loss", and no higher in cross-entropy."""
        return getattr(self, watched) < getattr(other, watched) and self.loss <= other.loss


@dataclass(frozen=True, slots=True)
class Lessons:
    """What to train on, and how.

    Attributes:
        rows: Windows to train on, int64 [n, T].
        validation: Windows to choose by, int64 [v, T], none of them in `rows`.
        settings: How.
        scope: What a state depends on besides.
    """

    rows: Tensor
    validation: Tensor
    settings: Settings
    scope: str


@dataclass(slots=True)
class Training:
    """A student with the parts of it that are trained, by name.

    Attributes:
        student: Called with rows and what enters its first block.
        parameters: What the optimizer trains.
        others: What the guide of the loop trains; their values are a part of the state.
    """

    student: nn.Module
    parameters: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter] = field(default_factory=dict)


class Guide(Protocol):
    """What else happens around every update."""

    def before(self, share: float) -> None:
        """Set up the student where a share of the budget is used."""

    def after(self, share: float, now: float) -> None:
        """Train what the optimizer does not, after an update that took from `share` to `now` of the budget."""


class Judge:
    """Validation: the dense model's part is computed once.

    Args:
        teacher: The dense model.
        validation: int64 [v, T].
    """

    def __init__(self, teacher: Teacher, validation: Tensor) -> None:
        self._head, self._rows = teacher.head, validation
        rank, processes = parallel.process()
        size = _micro_rows(validation, teacher.device)
        self._batches = []
        for number, rows in enumerate(validation.split(size)):
            if number % processes == rank:
                entering, states = teacher(rows)
                place = slice(number * size, number * size + len(rows))
                with torch.no_grad():
                    reference = states[-1], teacher.head.normaliser(states[-1])
                self._batches.append((place, rows, entering, reference))

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> Quality:
        """Figures of a student, the same in every process."""
        table = torch.zeros(len(self._rows), 2, dtype=torch.float64)
        for place, rows, entering, reference in self._batches:
            final = student(rows, entering)[-1].to(reference[0].dtype)
            (divergence,) = self._head.divergence(*reference, [final])
            table[place, 0] = divergence.double().mean(1).cpu()
            table[place, 1] = self._head.cross_entropy(final, rows[:, 1:]).double().mean(1).cpu()
        kl, loss = parallel.gather(table).mean(0).tolist()
        return Quality(kl, loss)


@dataclass(slots=True)
class _Run:
    """One run of the loop: what it trains with, and where it is."""

    training: Training
    teacher: Teacher
    rows: Tensor
    settings: Settings
    reporter: Reporter
    raw: torch.optim.Optimizer
    progress: TrainingState
    clock: "_Clock"

    def updates(self, until: float = 1.0, guide: Guide | None = None) -> Iterator[tuple[bool, str, float]]:
        """Update until a share of the budget is used.

        Yields:
            After each update: whether a tenth of the budget was passed, what is left for people, and the loss.
        """
        settings, progress = self.settings, self.progress
        accelerator = Accelerator(cpu=self.teacher.device.type == "cpu", mixed_precision=settings.precision)
        student = accelerator.prepare_model(self.training.student, device_placement=False)
        optimizer = accelerator.prepare_optimizer(self.raw, device_placement=False)
        spoken, batch = time.monotonic(), batch_rows(settings, self.rows)
        while (share := _share(settings, progress.step, progress.seconds)) < until:
            for group in self.raw.param_groups:
                group["lr"] = settings.learning_rate * schedule(share)
            if guide is not None:
                guide.before(share)
            mine = self.rows[torch.tensor(batch_of(progress.step, batch, len(self.rows), settings.seed))]
            loss = _update(accelerator, student, optimizer, self.teacher, mine, self.training.parameters, settings)
            progress.step, progress.seconds = progress.step + 1, self.clock()
            now = min(1.0, _share(settings, progress.step, progress.seconds))
            if guide is not None:
                guide.after(share, now)
            left = duration(progress.seconds / max(now, 1e-9) * (1 - now))
            told = f"step {progress.step} " + (f"({now:.0%}, {left} left)" if now < 1 else "(100%)")
            passed = int(now * VALIDATIONS) > int(share * VALIDATIONS)
            if not passed and time.monotonic() - spoken > LOG_INTERVAL_SECONDS:
                self.reporter.say(f"  healing: {told}, training loss {loss:.4f}")
            if passed or time.monotonic() - spoken > LOG_INTERVAL_SECONDS:
                spoken = time.monotonic()
            yield passed, told, loss

    def save(self, state: Path | None, scope: str) -> None:
        """Write the state, by the first process."""
        if parallel.process()[0] == 0:
            named = {**self.training.parameters, **self.training.others}
            save_state(state, scope, self.progress, named, self.raw)


def _run(
    training: Training, teacher: Teacher, rows: Tensor, settings: Settings, reporter: Reporter, state: Path | None,
    scope: str,
) -> tuple[_Run, bool]:  # fmt: skip
    """A run, and whether it goes on where an earlier one stopped."""
    raw = _optimizer(training.parameters, settings)
    found = load_state(state, scope, {**training.parameters, **training.others}, raw)
    if found is not None and found.step:
        reporter.say(f"  healing: resumed at step {found.step}")
    progress = found or TrainingState(best={})
    return _Run(training, teacher, rows, settings, reporter, raw, progress, _Clock(progress.seconds)), found is not None


def train(
    training: Training, teacher: Teacher, judge: Judge, start: Quality, rows: Tensor, settings: Settings,
    reporter: Reporter, state: Path | None, scope: str, carried: Carried | None = None,
) -> TrainingState:  # fmt: skip
    """Update to the end, validate ten times, keep the best and the state.

    Args:
        training: What is trained.
        teacher: The dense model.
        judge: By held-out windows.
        start: Of the untrained student.
        rows: Windows to train on, int64 [n, T].
        settings: How.
        reporter: For progress.
        state: File to resume from.
        scope: What the state depends on.
        carried: Where an earlier part of the same training ended; it goes on from there.
    """
    run, resumed = _run(training, teacher, rows, settings, reporter, state, scope)
    progress, what, best = run.progress, watched(settings.loss), start

    def judged(**more: float) -> Quality:
        # Not the wrapped student: processes judge different numbers of batches, and its forward is a collective.
        nonlocal best
        quality = judge(training.student)
        progress.curve.append(
            {"step": progress.step, "seconds": round(progress.seconds, 1), **figures(quality), **more}
        )
        if quality.better_than(best, what):
            best, progress.best_step = quality, progress.step
            progress.best = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
        progress.seconds = run.clock()
        return quality

    if resumed:
        best = Quality(**{key: progress.curve[_best(progress)][key] for key in ("kl", "loss")})
    else:
        progress.curve.append({"step": 0, "seconds": 0.0, **figures(start)})
        progress.best = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
        if carried is not None and carried.step:
            carry(carried, training.parameters, run.raw)
            progress.step, progress.seconds = carried.step, carried.seconds
            run.clock = _Clock(progress.seconds)
            judged()
    for passed, told, loss in run.updates():
        if passed:
            quality = judged(train=loss)
            run.save(state, scope)
            held_out = f"held-out KL {quality.kl:.4f}, loss {quality.loss:.4f}"
            reporter.say(f"  healing: {told}, training loss {loss:.4f}, {held_out}")
    return progress


def train_until(
    training: Training, teacher: Teacher, guide: Guide, until: float, rows: Tensor, settings: Settings,
    reporter: Reporter, state: Path | None, scope: str,
) -> Carried:  # fmt: skip
    """Update until a share of the budget is used, with a guide and without validation.

    Returns:
        All that was trained, for `train` to go on from.
    """
    run, _ = _run(training, teacher, rows, settings, reporter, state, scope)
    for passed, told, loss in run.updates(until, guide):
        if passed:
            run.save(state, scope)
            reporter.say(f"  healing: {told}, training loss {loss:.4f}")
    run.save(state, scope)
    return Carried.of(training.parameters, run.raw, run.progress, teacher.first)


def _update(
    accelerator: Accelerator, student: nn.Module, optimizer: Any, teacher: Teacher, rows: Tensor,
    parameters: Mapping[str, nn.Parameter], settings: Settings,
) -> float:  # fmt: skip
    """One update from this process's share of a batch, int64 [b, T]; returns the mean loss of all shares."""
    total = torch.zeros((), dtype=torch.float64)
    rank, processes = parallel.process()
    share = rows[rank::processes]
    micro = share.split(_micro_rows(rows, teacher.device))
    for number, part in enumerate(micro):
        weight = len(part) / len(share)
        waits = accelerator.no_sync(student) if number < len(micro) - 1 else nullcontext()
        with waits:
            with accelerator.autocast():
                entering, targets = teacher(part, entering_only=settings.loss == "next-token")
            states = student(part, entering)
            if settings.loss == "hidden":
                objective = hidden_distance(states, targets[-len(states) :]) * weight
                value = objective.detach().double().cpu()
            else:
                final = states[-1]
                reference = targets[-1] if targets else None
                with accelerator.autocast():
                    value, gradient = head_gradient(teacher.head, settings.loss, final, reference, part)
                value = value * weight
                # Its gradient by the states is the one already computed, so that no graph holds logits.
                objective = (final * gradient.mul_(weight)).sum()
            accelerator.backward(objective)
        total += value
    norm = accelerator.clip_grad_norm_(list(parameters.values()), MAX_GRADIENT_NORM)
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return float(parallel.gather(total.view(1))) / processes


def _optimizer(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "spam":
        return SPAM(parameters.values(), settings.learning_rate)
    return torch.optim.AdamW(parameters.values(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)


def schedule(share: float) -> float:
    """Factor of the learning rate when a share in [0, 1) of the budget is used: linear warm-up, then half a cosine.

    Source: arXiv 1608.03983 without restarts. Inferred: 5% warm-up, down to 5% of the peak.
    """
    if share < WARMUP:
        return (share + WARMUP / 10) / (WARMUP * 1.1)
    return FLOOR + (1 - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def batch_of(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Windows of one update: the next `batch` of an endless row of seeded permutations of `count` windows."""
    places = range(step * batch, (step + 1) * batch)
    return [_permutation(seed, place // count, count)[place % count] for place in places]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _share(settings: Settings, step: int, seconds: float) -> float:
    """Used share of the budget in steps or in time, whichever is further."""
    shares = [0.0]
    if settings.steps is not None:
        shares.append(step / settings.steps if settings.steps else 1.0)
    if settings.minutes is not None:
        shares.append(seconds / (60 * settings.minutes) if settings.minutes else 1.0)
    return max(shares)


class _Clock:
    """Seconds of training, over all runs of it and the same in every process."""

    def __init__(self, before: float) -> None:
        self._start = time.perf_counter() - before

    def __call__(self) -> float:
        own = time.perf_counter() - self._start if parallel.process()[0] == 0 else 0.0
        return float(parallel.gather(torch.tensor([own], dtype=torch.float64)))


def batch_rows(settings: Settings, rows: Tensor) -> int:
    """Windows in one update: a multiple of the number of processes."""
    processes = parallel.process()[1]
    return max(1, round(settings.batch_tokens / rows.shape[1] / processes)) * processes


def _micro_rows(rows: Tensor, device: torch.device) -> int:
    return max(1, MICRO_BATCH_TOKENS.get(device.type, 2048) // rows.shape[1])


def text_of(rows: Tensor) -> str:
    """Digest of rows of tokens."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def watched(loss: Loss) -> str:
    """The figure of `Quality` that a training by this loss is judged by."""
    return "loss" if loss == "next-token" else "kl"


def _best(progress: TrainingState) -> int:
    return [point["step"] for point in progress.curve].index(progress.best_step)


def figures(quality: Quality) -> dict[str, float]:
    """As a curve's entry holds them."""
    return {"kl": quality.kl, "loss": quality.loss}
