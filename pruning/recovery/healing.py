"""Healing: train the adapters, and low-rank changes of kept weights, after the closed-form emulation."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.families import Family
from pruning.forward import parallel
from pruning.forward.streams import describe
from pruning.models.modeling import blocks_of, sources_of
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer
from pruning.recovery.distillation import Student, Teacher, cut_copy
from pruning.recovery.emulation import Recovery
from pruning.recovery.lora import LoraLinear, add_lora
from pruning.recovery.training import Judge, Settings, Trained, Training, batch_rows, figures, text_of, train, watched
from pruning.recovery.training_state import Carried
from pruning.variants import REMOVED, variant


@dataclass(slots=True)
class Prepared(Training):
    """A student of a pruned model with the parts of it that are trained.

    Attributes:
        emulations: Sublayer -> module in its place, whose parameters are trained.
        changes: Linear map in the dense model -> its change.
        norms: Norm in the dense model -> what is trained of it.
    """

    emulations: dict[Sublayer, nn.Module | None] = field(default_factory=dict)
    changes: dict[str, LoraLinear] = field(default_factory=dict)
    norms: dict[str, nn.Parameter] = field(default_factory=dict)


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
    carried: Carried | None = None,
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
        carried: Where training began with another student, as `prune_aware.tune` does; it goes on from there.

    Returns:
        The best recovery found, with the low-rank changes merged into its weights, and a record of how it came about.

    Raises:
        RecipeError: There is nothing to train.
    """
    first = first_block(recovery.emulations, settings.trained)
    if carried is not None:
        first = min(first, carried.first)
    training = prepared(model, family, plan, recovery, first, settings)
    if not training.parameters:
        raise RecipeError(NOTHING_TO_TRAIN)
    teacher = Teacher(model, family, first)
    judge = Judge(teacher, validation)
    start = judge(_student(model, family, plan, recovery, first))
    scope = scope_of(scope, settings, recovery, rows, validation)
    progress = train(training, teacher, judge, start, rows, settings, reporter, state, scope, carried)
    with torch.no_grad():
        for name, parameter in training.parameters.items():
            parameter.copy_(progress.best[name])
    healed = _merged(training, recovery)
    end = judge(_student(model, family, plan, healed, first))
    improved = end.better_than(start, watched(settings.loss))
    record = {
        "trained": settings.trained, "parameters": sum(p.numel() for p in training.parameters.values()),
        "steps": progress.step, "tokens": progress.step * batch_rows(settings, rows) * rows.shape[1],
        "seconds": round(progress.seconds, 1), "best_step": progress.best_step, "improved": improved,
        "validation_tokens": validation.numel(), "start": figures(start), "end": figures(end if improved else start),
        "curve": progress.curve,
    }  # fmt: skip
    reporter.say(
        f"healing: {progress.step} steps in {progress.seconds:.0f} s; on held-out windows KL {start.kl:.4f} -> "
        f"{record['end']['kl']:.4f}, loss {start.loss:.4f} -> {record['end']['loss']:.4f}"
        + ("" if improved else "; no improvement, so the start is kept")
    )
    return (healed if improved else recovery), record


def scope_of(scope: str, settings: Settings, recovery: Recovery, *texts: Tensor) -> str:
    """What the state of a training depends on."""
    read = " ".join(map(text_of, texts))
    return f"{scope} {settings} {describe(recovery.emulations)} {read} {parallel.process()[1]}"


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


def prepared(
    model: PreTrainedModel, family: Family, plan: Plan, recovery: Recovery, first: int, settings: Settings
) -> Prepared:
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
    return Prepared(student, parameters, {}, copies, changes, norms)


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


def _merged(training: Prepared, recovery: Recovery) -> Recovery:
    """The trained parts as a recovery in the model's dtype."""
    emulations = copy.deepcopy(recovery.emulations)
    for sublayer, module in emulations.items():
        trained = training.emulations[sublayer]
        if module is not None and trained is not None:
            module.load_state_dict(trained.state_dict())
    weights = {f"{name}.weight": change.merged() for name, change in training.changes.items()}
    weights |= {name: norm.detach().clone() for name, norm in training.norms.items()}
    return replace(recovery, emulations=emulations, weights={**recovery.weights, **weights})
