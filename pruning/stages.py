"""What a recipe asks of each stage: the plain values that calibration, choice, fit and healing are called with."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pruning
from pruning import windows
from pruning.budget import HELD_OUT_WINDOWS, Counts, counts
from pruning.console import Reporter
from pruning.errors import CalibrationError, RecipeError
from pruning.evaluation.questions import holds_questions, parse_task
from pruning.evaluation.tasks import TaskEvaluator, read_task
from pruning.export.formats import format_named
from pruning.export.untouched import links_to
from pruning.families import has_biases
from pruning.forward import parallel
from pruning.forward.evaluator import Evaluator
from pruning.forward.streaming import open_streamed
from pruning.importance import Sampling, Scores
from pruning.models.finding import Source
from pruning.models.loading import DenseModel, load_model
from pruning.models.memory import STREAMED_STATE_BYTES
from pruning.models.sizes import biases_bytes, saved_bytes, weight_bytes
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer, Unit, UnitKind, parse_share, shortest, sublayers_of
from pruning.recipe import Recipe, by_head, emulation_kind, limits, recalibrates
from pruning.recovery.emulation import Recovery, fit_candidates, fit_plan, recover
from pruning.recovery.fuse import Fusion, check_fusable, fuse
from pruning.recovery.healing import heal
from pruning.recovery.training import Lessons, Precision, Settings
from pruning.recovery.training_state import Carried
from pruning.request import weight_changing_flag
from pruning.search import selection
from pruning.search.selection import Judge, Selection
from pruning.texts.calibration import from_files, other_windows, repeated, self_generated, standard_library
from pruning.texts.shipped import rows_held_out, rows_to_choose_on
from pruning.variants import REMOVED, cache_of, narrows, row, skips
from pruning.workdir import Journal, cache_directory, healing_states

HEALING_VALIDATION_WINDOWS = 16
HEALING_TOKENS = 10_000_000  # text read where the number of updates is not known
HEALING_MINUTES = 30.0
SEARCH_FIT_TOKENS = 16384  # that a search fits its emulations on, in each half; every base that it tries costs a fit
SEARCH_BATCH_TOKENS = 2048
SCORING_STATE_BYTES = 2**26  # hidden states held at once; more is no faster on a CPU


def join(reporter: Reporter) -> None:
    """Join the other processes of `torchrun`, where there are any; only the first says how it goes."""
    parallel.start()
    reporter.console.quiet = parallel.process()[0] != 0


def opened(source: Source, recipe: Recipe) -> DenseModel:
    """The model, in memory as a whole or block by block as it is needed."""
    if recipe.stream:
        return open_streamed(source, recipe.dtype, recipe.device)[0]
    return load_model(source, recipe.dtype, recipe.device)


def calibrate(dense: DenseModel, recipe: Recipe, reporter: Reporter) -> tuple[Tensor, Tensor]:
    """Tokens to fit on and tokens held out for the quality figures, int64 [n, T] and [m, T']: the first process's."""
    found: tuple[Tensor, Tensor] = parallel.of_first(lambda: _texts(dense, recipe, reporter))
    return found


def _texts(dense: DenseModel, recipe: Recipe, reporter: Reporter) -> tuple[Tensor, Tensor]:
    if limits(recipe):
        return windows.texts(dense, recipe)
    length = recipe.row_tokens
    tokens = recipe.fit_tokens + HELD_OUT_WINDOWS * length
    if recipe.calibration:
        rows = from_files(recipe.calibration, dense.tokenizer, tokens, length, recipe.seed)
    elif narrows(recipe.kind) or skips(recipe.kind):
        chosen = rows_to_choose_on(dense.tokenizer, length, -(-recipe.fit_tokens // length))
        return chosen, rows_held_out(dense.tokenizer, length, HELD_OUT_WINDOWS)
    elif recipe.stream:
        rows = standard_library(dense.tokenizer, tokens, length, recipe.seed)
    else:
        count = -(-tokens // length)
        rows = self_generated(dense.model, dense.tokenizer, count, length, recipe.seed, reporter)
    return rows[HELD_OUT_WINDOWS:], rows[:HELD_OUT_WINDOWS]


def judges_of(
    dense: DenseModel, recipe: Recipe, tokens: Tensor, journal: Journal, reporter: Reporter,
    found: windows.Limits | None = None,
) -> list[Judge]:  # fmt: skip
    """What plans are judged on: tasks, calibration text, or two halves of it of different domains, crosswise.

    In the last case each half is judged with emulations that were fitted on the other. With `--copying`, repeated
    windows of the same text judge as well: layers that copy from the context cost little on text, and their work is
    what no map of a single token brings back. Where attention is limited, every judge has the windows in place, of the
    size for rows of calibration text.
    """
    limiting: list[Judge] = []
    if limits(recipe):
        found = found or windows.limited(dense, recipe, tokens, reporter)
        limiting = windows.judges(dense, recipe, tokens, found, journal, reporter)
    settings: dict[str, Any] = {
        "state_bytes": SCORING_STATE_BYTES if dense.residency.keeps_blocks else STREAMED_STATE_BYTES,
        "journal": journal, "residency": dense.residency,
    }  # fmt: skip
    count = max(1, recipe.score_tokens // recipe.row_tokens)
    fitted = max(1, SEARCH_FIT_TOKENS // recipe.row_tokens)

    def judge(name: str, rows: Tensor, fit: Tensor | None) -> Judge:
        evaluator = Evaluator(dense.model, dense.family, rows, **settings)
        if fit is None:
            return Judge(name, evaluator)
        adapters = _adapters(dense, recipe, fit[:fitted], reporter)
        return Judge(name, evaluator, 1.0, adapters, _identity(recipe, fit[:fitted]))

    if limiting:
        texts = limiting[:1]
    elif recipe.task or not recipe.recovery_aware:
        texts = [judge("calibration text", tokens[:count], tokens if recipe.recovery_aware else None)]
    else:
        texts = [
            judge(f"half {number}", rows[: max(1, count // 2)], others)
            for number, (rows, others) in enumerate(_halves(recipe, tokens, reporter), 1)
        ]
    judges = [_task_judge(dense, recipe, path, texts[0], settings) for path in recipe.task] or limiting or list(texts)
    if recipe.task and found is not None:
        windows.check_reach(judges, found)
    if recipe.copying:
        for text in texts:
            rows, copies = repeated(torch.cat(text.evaluator.batches))
            evaluator = Evaluator(dense.model, dense.family, rows, counted=copies, **settings)
            name = f"{text.name}, repeated"
            judges.append(replace(text, name=name, evaluator=evaluator, weight=recipe.copying))
    return judges


def _halves(recipe: Recipe, tokens: Tensor, reporter: Reporter) -> list[tuple[Tensor, Tensor]]:
    """Windows of every second source and of the others, and the same two the other way round."""
    sources = len(recipe.calibration) or 2
    if sources == 1:
        reporter.say("note: all text is of one file; --recovery-aware is best with --calibration files of two domains")
    row_source = [(HELD_OUT_WINDOWS + row) % max(2, sources) for row in range(len(tokens))]
    one, other = (tokens[[row for row, source in enumerate(row_source) if source % 2 == half]] for half in (0, 1))
    return [(one, other), (other, one)]


def _task_judge(dense: DenseModel, recipe: Recipe, task: str, text: Judge, settings: Mapping[str, Any]) -> Judge:
    """What one `--task` asks for, with the emulations that calibration text is judged with."""
    path, weight = parse_task(task)
    evaluator: Evaluator
    if holds_questions(path):
        questions = read_task(path, dense.tokenizer, recipe.score_tokens)
        evaluator = TaskEvaluator(dense.model, dense.family, questions, dense.tokenizer, recipe.judged_by, **settings)
    else:
        rows = from_files([path], dense.tokenizer, recipe.score_tokens, recipe.row_tokens, recipe.seed)
        evaluator = Evaluator(dense.model, dense.family, rows, **settings)
    return replace(text, name=path.name, evaluator=evaluator, weight=weight)


def _identity(recipe: Recipe, tokens: Tensor) -> str:
    """Digest of what adapters depend on besides the model."""
    settings = f"{recipe.kind} {recipe.rank} {recipe.sources} {tuple(tokens.shape)}"
    return hashlib.sha256(settings.encode() + tokens.numpy().tobytes()).hexdigest()


def _adapters(dense: DenseModel, recipe: Recipe, tokens: Tensor, reporter: Reporter) -> selection.Adapters:
    """Emulations of what may go, fitted on `tokens`; those for the last base are kept."""
    evaluator = Evaluator(dense.model, dense.family, tokens)
    candidates = sublayers_of(free_units(counts(recipe, len(evaluator.blocks)), len(evaluator.blocks), recipe.keep))
    kept: dict[tuple[Sublayer, ...], dict[Sublayer, nn.Module]] = {}

    def adapters(base: Sequence[Sublayer]) -> Mapping[Sublayer, nn.Module]:
        key = tuple(sorted(base))
        if key not in kept:
            kept.clear()
            kept[key] = fit_candidates(
                evaluator,
                key,
                candidates,
                emulation_kind(recipe),
                recipe.rank,
                reporter,
                recipe.sources,
                recipe.window or 0,
            )
        return kept[key]

    return adapters


def groups_of(wanted: Counts, num_blocks: int, keep: Sequence[int]) -> list[tuple[list[Unit], int]]:
    """Candidates of every kind that something of is to go, and how many."""
    free = [block for block in range(num_blocks) if block not in keep]
    kinds: list[tuple[tuple[UnitKind, ...], int]] = [
        (("block",), wanted.blocks), (("attention",), wanted.attention), (("ffn",), wanted.ffn),
        (KINDS, wanted.sublayers),
    ]  # fmt: skip
    return [([Unit(block, kind) for block in free for kind in some], count) for some, count in kinds if count]


def free_units(wanted: Counts, num_blocks: int, keep: Sequence[int]) -> list[Unit]:
    """All candidates."""
    return [unit for units, _ in groups_of(wanted, num_blocks, keep) for unit in units]


def choose(judges: Sequence[Judge], recipe: Recipe, wanted: Counts, reporter: Reporter) -> Selection:
    """Score the units and choose those to remove."""
    if wanted == Counts():
        return Selection([], {})
    num_blocks = len(judges[0].evaluator.blocks)
    depth = wanted.attention + wanted.ffn + wanted.blocks + wanted.sublayers
    if recipe.max_loss_increase is not None or recipe.weight_budget is not None:
        depth = num_blocks // 3
    return selection.select(
        judges, groups_of(wanted, num_blocks, recipe.keep), recipe.metric, recipe.search,
        Sampling(recipe.seed, recipe.draws, depth), reporter,
        objective=recipe.objective, generations=recipe.generations, offspring=recipe.offspring,
    )  # fmt: skip


def tasks_of(
    judges: Sequence[Judge], recipe: Recipe, wanted: Counts, chosen: Selection, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Print, and return for the manifest, what the plan costs every task, and what each task alone would choose."""
    found = selection.trade_off(judges, groups_of(wanted, len(judges[0].evaluator.blocks), recipe.keep), chosen)
    named = {name or "chosen plan": costs for name, costs in found.items()}
    reporter.say("increase by task: " + ", ".join(f"{judge.name} (weight {judge.weight:g})" for judge in judges))
    for name, costs in named.items():
        label = name if name == "chosen plan" else f"plan for {name} alone"
        reporter.say(f"  {label}: " + ", ".join(f"{cost:+.4f}" for cost in costs.values()))
    return named


def within_budget(
    dense: DenseModel, recipe: Recipe, order: Sequence[Unit], tokens: Tensor, held_out: Tensor, reporter: Reporter,
    prepared: Mapping[Sublayer, Any] | None = None,
) -> list[Unit]:  # fmt: skip
    """The units of `order` that a budget in weights or in loss lets go; all where there is no such budget.

    Raises:
        RecipeError: The budget cannot be met.
    """
    if recipe.weight_budget is not None:
        kind = emulation_kind(recipe)
        removed = dict.fromkeys(sublayers_of(order), kind)
        each = saved_bytes(dense, removed, recipe.rank, recipe.sources, fused=recipe.fuse)
        savings = [sum(each[s] for s in unit.sublayers) for unit in order]
        excess = math.ceil(weight_bytes(dense.model) * (1 - parse_share(recipe.weight_budget, "weight-budget")))
        excess += biases_bytes(dense) if recipe.fuse and kind != "none" else 0
        count = shortest(savings, excess)
        if count is None:
            raise RecipeError(f"--weight-budget {recipe.weight_budget} is out of reach: not even all sublayers save it")
        return list(order[:count])
    if recipe.max_loss_increase is not None:
        return _within_loss(dense, recipe, order, tokens, held_out, reporter, prepared)
    return list(order)


def _within_loss(
    dense: DenseModel, recipe: Recipe, order: Sequence[Unit], tokens: Tensor, held_out: Tensor, reporter: Reporter,
    prepared: Mapping[Sublayer, Any] | None,
) -> list[Unit]:  # fmt: skip
    """The longest start of `order` whose emulated plan stays inside the loss budget, by bisection."""
    bound = recipe.max_loss_increase
    assert bound is not None
    fitting = Evaluator(dense.model, dense.family, tokens, residency=dense.residency)
    batch = max(1, SEARCH_BATCH_TOKENS // held_out.shape[1])
    judging = Evaluator(dense.model, dense.family, held_out, batch, residency=dense.residency)
    before = float(judging.loss({}).mean())
    fits, fails = 0, len(order) + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        removed = dict.fromkeys([*dense.limits, *sublayers_of(order[:middle])], emulation_kind(recipe))
        emulations: Mapping[Sublayer, Any] = prepared or {}
        if prepared is None:
            emulations = fit_plan(fitting, removed, recipe.rank, reporter, recipe.sources)
        increase = float(judging.loss({s: emulations[s] for s in removed}).mean()) - before
        reporter.say(f"{middle} removed: loss increase {increase:.4f} nats per token")
        fits, fails = (middle, fails) if increase <= bound else (fits, middle)
    if not fits:
        raise RecipeError(f"--max-loss-increase {bound} is out of reach: removing one sublayer costs more")
    return list(order[:fits])


def plan_of(
    gone: Sequence[Unit], num_blocks: int, recipe: Recipe, before: Mapping[Sublayer, EmulationKind] | None = None,
    found: windows.Limits | None = None, units: Mapping[int, int] | None = None,
) -> Plan:  # fmt: skip
    """The plan: sublayers of a block that goes as a whole share another's weights or are not emulated, others are.

    What earlier runs limited (`before`) is a part of it. `found` are the limits of its layers, where they are known.
    """
    removed: dict[Sublayer, EmulationKind] = dict(before or {})
    for unit in gone:
        kind = emulation_kind(recipe)
        if unit.kind == "block" and kind != REMOVED and row(kind).unit != "block":
            kind = REMOVED
        removed |= dict.fromkeys(unit.sublayers, kind)
    plan = Plan(
        num_blocks, dict(sorted(removed.items())), recipe.rank, recipe.sources, recipe.window or 0,
        found.full_heads() if found else {}, units or {},
        {block: size for block, size in found.windows().items() if size != recipe.window} if found else {},
    )  # fmt: skip
    if not any(cache_of(plan.removed.get(Sublayer(b, "attention"))) != "none" for b in range(num_blocks)):
        raise RecipeError("no attention layer would be left; protect some with --keep, or ask for less")
    return plan


def shares_weights(recipe: Recipe, wanted: Counts, dense: DenseModel, output: Path) -> bool:
    """Whether the export takes next to no room: a plan file, or links to the dense model's files."""
    if not format_named(recipe.format).weights:
        return True
    same = recipe.dtype == "auto" and weight_changing_flag(recipe, wanted) is None
    return same and links_to(dense.directory, output)


def forwards(dense: DenseModel, recipe: Recipe) -> AbstractContextManager[Any]:
    """The arithmetic of forward passes that the recipe asks for."""
    half = recipe.fit_precision == "bfloat16"
    return torch.autocast(dense.model.device.type, torch.bfloat16) if half else nullcontext()


def journal_of(output: Path | None, dense: DenseModel, recipe: Recipe) -> Journal:
    """The journal of the values that one output needs, in the user's cache; a file for each process.

    What windows are chosen by serves every budget, so it is kept for the model.
    """
    scope = f"{dense.weight_hash} {dense.model.dtype} {recipe.fit_precision} {torch.get_num_threads()}"
    rank, processes = parallel.process()
    if by_head(recipe):
        scope += f" {pruning.__version__}"
        key = hashlib.sha256(f"{scope} {rank} of {processes}".encode()).hexdigest()[:16]
        return Journal(cache_directory() / "searches" / f"{key}.jsonl", scope, lasting=True)
    if output is None:
        return Journal(None, scope)
    key = hashlib.sha256(f"{output.resolve()} {rank} of {processes}".encode()).hexdigest()[:16]
    return Journal(cache_directory() / "journals" / f"{key}.jsonl", scope)


def recovered(
    dense: DenseModel, plan: Plan, recipe: Recipe, tokens: Tensor, reporter: Reporter,
    prepared: Mapping[Sublayer, Any] | None = None, found: windows.Limits | None = None,
) -> Recovery | Fusion:  # fmt: skip
    """Adapters, or the changes of kept weights that take their place.

    Kept weights are refitted beside limited layers (`found`) that have windows for these rows.
    """
    evaluator = Evaluator(dense.model, dense.family, tokens, residency=dense.residency)
    how = {"compensated": recipe.compensate, "recalibrated": recalibrates(recipe)}
    with forwards(dense, recipe):
        if not recipe.fuse:
            recovery = recover(
                evaluator, plan.removed, plan.rank, reporter, sources=plan.sources, window=plan.window,
                prepared={**(prepared or {}), **found.scored} if found else prepared, **how,
            )  # fmt: skip
            return replace(recovery, emulations=windows.as_served(recovery.emulations, found)) if found else recovery
        check_fusable(dense.family, plan.removed)
        biased = has_biases(dense.model.config)
        return fuse(evaluator, plan.removed, plan.rank, reporter, biased=biased, **how)


def lessons_of(
    dense: DenseModel, recipe: Recipe, tokens: Tensor, held_out: Tensor, reporter: Reporter
) -> Lessons:  # fmt: skip
    """The text to train on, and how.

    Windows that were fitted on and the files' others, chosen by windows of neither. Without files the model writes as
    many others again; windows and narrower FFNs take the rest of the package's text.
    """
    length = recipe.row_tokens
    budget = HEALING_TOKENS if recipe.heal_steps is None else recipe.heal_steps * recipe.heal_batch_tokens
    budget += HEALING_VALIDATION_WINDOWS * length
    if limits(recipe):
        others = windows.others(dense, recipe, budget, tokens, held_out)
    elif recipe.calibration:
        others = other_windows(recipe.calibration, dense.tokenizer, budget, length, torch.cat([held_out, tokens]))
    elif narrows(recipe.kind):
        others = rows_to_choose_on(dense.tokenizer, length)[len(tokens) :][: budget // length]
    else:
        others = self_generated(dense.model, dense.tokenizer, len(tokens), length, recipe.seed + 1, reporter)
    rows = torch.cat([others, tokens])
    count = max(1, min(HEALING_VALIDATION_WINDOWS, len(rows) // 8))
    if len(rows) < 2:
        raise CalibrationError("--heal needs two calibration windows at least; give more text")
    settings = Settings(
        trained="adapters" if recipe.heal == "adapters" else "lora", loss=recipe.heal_loss,
        optimizer=recipe.heal_optimizer, learning_rate=recipe.heal_learning_rate, lora_rank=recipe.heal_lora_rank,
        steps=recipe.heal_steps, minutes=HEALING_MINUTES if {recipe.heal_steps, recipe.heal_minutes} == {None} else
        recipe.heal_minutes, batch_tokens=recipe.heal_batch_tokens, precision=healing_precision(dense, recipe),
        seed=recipe.seed,
    )  # fmt: skip
    scope = f"{dense.weight_hash} {torch.get_num_threads()} {recipe.model_dump_json()}"
    return Lessons(rows[count:], rows[:count], settings, scope)


def healed(
    dense: DenseModel, plan: Plan, recovery: Recovery, lessons: Lessons, output: Path, reporter: Reporter,
    found: windows.Limits | None = None, carried: Carried | None = None,
) -> tuple[Recovery, dict[str, Any]]:  # fmt: skip
    """The recovery after training, and how that went; resumed where an earlier run of the same request was killed.

    Limited layers (`found`) are trained with windows for these rows. `carried` is what was trained with gates before.
    """
    if found is not None:
        recovery = replace(recovery, emulations={sublayer: found.scored[sublayer] for sublayer in recovery.emulations})
    recovery, record = heal(
        dense.model, dense.family, plan, recovery, lessons.rows, lessons.validation, lessons.settings, reporter,
        state=healing_states(output)[1], scope=lessons.scope, carried=carried,
    )  # fmt: skip
    if found is not None:
        recovery = replace(recovery, emulations=windows.as_served(recovery.emulations, found))
    return recovery, record


def healing_precision(dense: DenseModel, recipe: Recipe) -> Precision:
    """What healing computes in.

    Raises:
        RecipeError: float16 on a CPU.
    """
    if dense.model.dtype == torch.float16:
        if dense.model.device.type == "cpu":
            raise RecipeError("--heal cannot train in float16 on a CPU; use --dtype float32 or bfloat16")
        return "fp16"
    return "bf16" if dense.model.dtype == torch.bfloat16 or recipe.heal_precision == "bfloat16" else "no"


def table_of(scores: Mapping[str, Scores], importance: str) -> dict[str, dict[str, float]]:
    """Scores as `pruning.json` holds them: metric, metric of each judge, and standard errors."""
    out: dict[str, dict[str, float]] = {}
    for name, entry in scores.items():
        label = f"{importance} ({name})" if name else importance
        out[label] = {str(unit): value for unit, value in entry.values.items()}
        if entry.errors:
            out[f"{label}, standard error"] = {str(unit): value for unit, value in entry.errors.items()}
    return out
