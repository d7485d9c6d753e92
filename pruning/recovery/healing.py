"""Healing: train the adapters, and low-rank changes of kept weights, after the closed-form emulation."""

import copy
import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.console import LOG_INTERVAL_SECONDS, Reporter, duration
from pruning.errors import RecipeError
from pruning.families import Family
from pruning.forward import parallel
from pruning.forward.streams import describe
from pruning.models.modeling import blocks_of, sources_of
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer
from pruning.recovery.distillation import Loss, Student, Teacher, cut_copy, head_gradient, hidden_distance
from pruning.recovery.emulation import Recovery
from pruning.recovery.lora import LoraLinear, add_lora
from pruning.recovery.spam import SPAM
from pruning.recovery.training_state import TrainingState, load_state, save_state
from pruning.variants import REMOVED, variant

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


@dataclass(slots=True)
class _Training:
    """A student with the parts of it that are trained, by name."""

    student: Student
    emulations: dict[Sublayer, nn.Module | None]
    changes: dict[str, LoraLinear]
    norms: dict[str, nn.Parameter]
    parameters: dict[str, nn.Parameter]


def heal(
    model: PreTrainedModel,
    family: Family,
    plan: Plan,
    recovery: Recovery,
    rows: Tensor,
    validation: Tensor,
    settings: Settings,
    reporter: Reporter,
    *,
    state: Path | None = None,
    scope: str = "",
) -> tuple[Recovery, dict[str, Any]]:
    """Train what recovers a pruned model; what comes back is never worse on the validation windows.

    Only blocks from the first changed one on are trained and differentiated; those before run once for the dense and
    the pruned model together. Every process takes its share of each batch. With `steps` and no `minutes` the result
    depends on the seed and the number of threads only, also when the run was killed and resumed.

    Args:
        model: Dense model, left as it is.
        family: Where its parts are.
        plan: What is gone.
        recovery: What to start from, left as it is.
        rows: Windows to train on, int64 [n, T].
        validation: Windows to choose by, int64 [v, T], none of them in `rows`.
        settings: How.
        reporter: For progress.
        state: File to resume from; it is kept up to date, and stays when this returns.
        scope: What the state depends on besides the arguments.

    Returns:
        The best recovery found, with the low-rank changes merged into its weights, and a record of how it came about.

    Raises:
        RecipeError: There is nothing to train.
    """
    first = first_block(recovery.emulations, settings.trained)
    training = _prepare(model, family, plan, recovery, first, settings)
    if not training.parameters:
        raise RecipeError(NOTHING_TO_TRAIN)
    teacher = Teacher(model, family, first)
    judge = Judge(teacher, validation)
    start = judge(_student(model, family, plan, recovery, first))
    scope = (
        f"{scope} {settings} {describe(recovery.emulations)} {_text(rows)} {_text(validation)} {parallel.process()[1]}"
    )
    progress = _train(training, teacher, judge, start, rows, settings, reporter, state, scope)
    with torch.no_grad():
        for name, parameter in training.parameters.items():
            parameter.copy_(progress.best[name])
    healed = _merged(training, recovery)
    end = judge(_student(model, family, plan, healed, first))
    improved = end.better_than(start, _watched(settings.loss))
    record = {
        "trained": settings.trained, "parameters": sum(p.numel() for p in training.parameters.values()),
        "steps": progress.step, "tokens": progress.step * _batch_rows(settings, rows) * rows.shape[1],
        "seconds": round(progress.seconds, 1), "best_step": progress.best_step, "improved": improved,
        "validation_tokens": validation.numel(), "start": _figures(start), "end": _figures(end if improved else start),
        "curve": progress.curve,
    }  # fmt: skip
    reporter.say(
        f"healing: {progress.step} steps in {progress.seconds:.0f} s; on held-out windows KL {start.kl:.4f} -> "
        f"{record['end']['kl']:.4f}, loss {start.loss:.4f} -> {record['end']['loss']:.4f}"
        + ("" if improved else "; no improvement, so the start is kept")
    )
    return (healed if improved else recovery), record


NOTHING_TO_TRAIN = "nothing to heal: no emulation has weights to train; choose an --emulation, or --heal lora"


def first_block(emulations: Mapping[Sublayer, nn.Module | None], trained: Trained) -> int:
    """Index, in the dense model, of the first block that has to run for the pruned model alone.

    That is the block of the first removed sublayer or of the first that an emulation reads. Under "lora" the block
    before the first removal changes too: it writes what the removed sublayer no longer reads.
    """
    removed = min(sublayer.block for sublayer in emulations)
    sources = [source for emulation in emulations.values() for source in sources_of(emulation)]
    return min([max(0, removed - 1) if trained == "lora" else removed, *sources])


def _student(model: PreTrainedModel, family: Family, plan: Plan, recovery: Recovery, first: int) -> Student:
    cut = cut_copy(model, family, plan, copy.deepcopy(recovery.emulations), recovery.weights)
    return Student(cut, family, sum(block < first for block in plan.blocks_kept()))


def _prepare(
    model: PreTrainedModel, family: Family, plan: Plan, recovery: Recovery, first: int, settings: Settings
) -> _Training:
    """A student whose trained parts are its own, in float32, and all else shared with the dense model."""
    copies = copy.deepcopy(recovery.emulations)
    cut = cut_copy(model, family, plan, copies, recovery.weights)
    parameters = {}
    for sublayer, module in copies.items():
        for name, parameter in module.float().requires_grad_(True).named_parameters() if module else ():
            parameters[f"{sublayer}.{name}"] = parameter
    changes: dict[str, LoraLinear] = {}
    if settings.trained == "lora":
        generator = torch.Generator().manual_seed(settings.seed)
        for block, index in zip(blocks_of(cut, family), plan.blocks_kept(), strict=True):
            for kind, attribute in zip(KINDS, (family.attention, family.ffn), strict=True):
                own = plan.removed.get(Sublayer(index, kind))
                if index < first or (own is not None and not _keeps_weights(own)):
                    continue
                made = add_lora(block.get_submodule(attribute), settings.lora_rank, generator)
                changes |= {f"{family.blocks}.{index}.{attribute}.{name}": change for name, change in made.items()}
    for name, change in changes.items():
        parameters |= {f"{name}.down": change.down, f"{name}.up": change.up}
    norms = _trained_norms(cut, family, plan)
    parameters |= norms
    student = Student(cut, family, sum(block < first for block in plan.blocks_kept()))
    return _Training(student, copies, changes, norms, parameters)


def _keeps_weights(kind: EmulationKind) -> bool:
    """Whether a sublayer of this kind still runs with all of its own weights, which can then be trained."""
    return kind != REMOVED and variant(kind).in_place and not variant(kind).changes_weights


def _trained_norms(cut: PreTrainedModel, family: Family, plan: Plan) -> dict[str, nn.Parameter]:
    """The norms of sublayers with another block's weights, by their names in the dense model; here they are trained."""
    found: dict[str, nn.Parameter] = {}
    for block, index in zip(blocks_of(cut, family), plan.blocks_kept(), strict=True):
        for kind in KINDS:
            own = plan.removed.get(Sublayer(index, kind), REMOVED)
            trained = own != REMOVED and variant(own).trains_norms
            for norm in filter(None, family.norms(kind) if trained else ()):
                for name, parameter in list(getattr(block, norm).named_parameters()):
                    own = nn.Parameter(parameter.detach().float().clone())
                    setattr(getattr(block, norm), name, own)
                    found[f"{family.blocks}.{index}.{norm}.{name}"] = own
    return found


def _merged(training: _Training, recovery: Recovery) -> Recovery:
    """The trained parts as a recovery in the model's dtype."""
    emulations = copy.deepcopy(recovery.emulations)
    for sublayer, module in emulations.items():
        trained = training.emulations[sublayer]
        if module is not None and trained is not None:
            module.load_state_dict(trained.state_dict())
    weights = {f"{name}.weight": change.merged() for name, change in training.changes.items()}
    weights |= {name: norm.detach().clone() for name, norm in training.norms.items()}
    return replace(recovery, emulations=emulations, weights={**recovery.weights, **weights})


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


def _train(
    training: _Training, teacher: Teacher, judge: Judge, start: Quality, rows: Tensor, settings: Settings,
    reporter: Reporter, state: Path | None, scope: str,
) -> TrainingState:  # fmt: skip
    """The loop: update, validate ten times, keep the best and the state."""
    accelerator = Accelerator(
        cpu=teacher.device.type == "cpu",
        mixed_precision=settings.precision,
    )
    raw = _optimizer(training.parameters, settings)
    student = accelerator.prepare_model(training.student, device_placement=False)
    optimizer = accelerator.prepare_optimizer(raw, device_placement=False)
    progress = load_state(state, scope, training.parameters, raw)
    if progress is None:
        best = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
        progress = TrainingState(best=best, curve=[{"step": 0, "seconds": 0.0, **_figures(start)}])
    elif progress.step:
        reporter.say(f"  healing: resumed at step {progress.step}")
    best_quality = Quality(**{key: progress.curve[_best(progress)][key] for key in ("kl", "loss")})
    clock, spoken = _Clock(progress.seconds), time.monotonic()
    batch = _batch_rows(settings, rows)
    while (share := _share(settings, progress.step, progress.seconds)) < 1:
        for group in raw.param_groups:
            group["lr"] = settings.learning_rate * schedule(share)
        mine = torch.tensor(batch_of(progress.step, batch, len(rows), settings.seed))
        loss = _update(accelerator, student, optimizer, teacher, rows[mine], training.parameters, settings)
        progress.step, progress.seconds = progress.step + 1, clock()
        now = min(1.0, _share(settings, progress.step, progress.seconds))
        left = f"({now:.0%}, {duration(progress.seconds / max(now, 1e-9) * (1 - now))} left)" if now < 1 else "(100%)"
        if int(now * VALIDATIONS) > int(share * VALIDATIONS):
            # Not the wrapped one: processes judge different numbers of batches, and its forward is a collective.
            quality = judge(training.student)
            progress.curve.append(
                {"step": progress.step, "seconds": round(progress.seconds, 1), **_figures(quality), "train": loss}
            )
            if quality.better_than(best_quality, _watched(settings.loss)):
                best_quality, progress.best_step = quality, progress.step
                progress.best = {name: p.detach().clone() for name, p in training.parameters.items()}
            progress.seconds = clock()
            if parallel.process()[0] == 0:
                save_state(state, scope, progress, training.parameters, raw)
            reporter.say(
                f"  healing: step {progress.step} {left}, training loss {loss:.4f}, "
                f"held-out KL {quality.kl:.4f}, loss {quality.loss:.4f}"
            )
            spoken = time.monotonic()
        elif time.monotonic() - spoken > LOG_INTERVAL_SECONDS:
            spoken = time.monotonic()
            reporter.say(f"  healing: step {progress.step} {left}, training loss {loss:.4f}")
    return progress


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
        shares.append(step / settings.steps)
    if settings.minutes is not None:
        shares.append(seconds / (60 * settings.minutes))
    return max(shares)


class _Clock:
    """Seconds of training, over all runs of it and the same in every process."""

    def __init__(self, before: float) -> None:
        self._start = time.perf_counter() - before

    def __call__(self) -> float:
        own = time.perf_counter() - self._start if parallel.process()[0] == 0 else 0.0
        return float(parallel.gather(torch.tensor([own], dtype=torch.float64)))


def _batch_rows(settings: Settings, rows: Tensor) -> int:
    """Windows in one update: a multiple of the number of processes."""
    processes = parallel.process()[1]
    return max(1, round(settings.batch_tokens / rows.shape[1] / processes)) * processes


def _micro_rows(rows: Tensor, device: torch.device) -> int:
    return max(1, MICRO_BATCH_TOKENS.get(device.type, 2048) // rows.shape[1])


def _text(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def _watched(loss: Loss) -> str:
    return "loss" if loss == "next-token" else "kl"


def _best(progress: TrainingState) -> int:
    return [point["step"] for point in progress.curve].index(progress.best_step)


def _figures(quality: Quality) -> dict[str, float]:
    return {"kl": quality.kl, "loss": quality.loss}
