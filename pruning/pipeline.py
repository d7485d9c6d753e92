"""The stages in order: model, calibration, importance, plan, emulation, checkpoint."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import pruning
from pruning import narrowing, windows
from pruning.budget import Counts, skippable
from pruning.console import Reporter, duration, quiet_libraries
from pruning.errors import RecipeError, StorageError
from pruning.estimate import announce
from pruning.evaluation.evaluate import loss, perplexity_ratio
from pruning.export.copying import as_stored, copied
from pruning.export.formats import PrunedModel, format_named
from pruning.export.report import score_table, write_card, write_report
from pruning.export.untouched import BYTES, known_hashes, untouched
from pruning.export.writing import copy_companions
from pruning.families import Family
from pruning.finite import check_numbers
from pruning.forward import parallel
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling, metric
from pruning.models.chain import continued
from pruning.models.checkpoint import Manifest, verify, write_manifest
from pruning.models.loading import DenseModel
from pruning.models.sizes import describe_bytes, predicted_bytes
from pruning.models.surgery import apply_plan
from pruning.plan import EmulationKind, Plan, Sublayer, Unit, UnitKind, parse_share
from pruning.recipe import Recipe, by_head, emulation_kind, limits
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import Recovery
from pruning.recovery.fuse import Fusion
from pruning.request import Request
from pruning.search import selection
from pruning.search.selection import Selection
from pruning.search.skips import chosen as chosen_skips
from pruning.search.skips import cost, predicted
from pruning.stages import (
    calibrate,
    choose,
    forwards,
    healed,
    healing_precision,
    join,
    journal_of,
    judges_of,
    lessons_of,
    opened,
    plan_of,
    recovered,
    shares_weights,
    table_of,
    tasks_of,
    within_budget,
)
from pruning.variants import SKIPPING, changes_weights, narrows, skips
from pruning.variants.skip import counting
from pruning.windows import aware
from pruning.windows.plans import choose as choose_heads
from pruning.workdir import atomic_directory, check_free_space, healing_states

MEASURED_BATCH_TOKENS = 2048


def run(request: Request, output: Path, *, dry_run: bool, reporter: Reporter) -> Manifest | None:
    """Prune a model and write the checkpoint; with `dry_run` only say what would be done.

    A run that was killed goes on where it stopped when it is started again: scores are journalled in the cache.
    Under `torchrun` the processes choose, measure limits and heal together; the first fits and writes.

    Args:
        request: From `request.checked_export`.
        output: Directory to write; what is there is replaced.
        dry_run: Write nothing.
        reporter: For progress.

    Raises:
        UserError: What could not be known before the model was loaded; nothing is written then.
    """
    quiet_libraries()
    join(reporter)
    source, recipe, wanted = request.source, request.recipe, request.wanted
    num_blocks, context = source.num_blocks, recipe.context or 0
    with reporter.stage("load"):
        dense = opened(source, recipe)
    if recipe.heal != "none":
        healing_precision(dense, recipe)
    announce(dense, recipe, wanted, reporter, dry_run=dry_run)
    if not dry_run:
        dearest = plan_of([Unit(0, "attention")], num_blocks, recipe)
        needed = int(predicted_bytes(dense, dearest, context, fused=recipe.fuse)["weights"] * 1.05)
        if (stored := dense.residency.dtype) is not None:
            needed = needed * BYTES[stored] // dense.model.dtype.itemsize
        check_free_space(output, (0 if shares_weights(recipe, wanted, dense, output) else needed) + 2**24)
    with reporter.stage("calibrate"):
        tokens, held_out = calibrate(dense, recipe, reporter)
    with reporter.stage("score"), forwards(dense, recipe):
        journal = journal_of(None if dry_run else output, dense, recipe)
        exact = journal if recipe.fit_precision == "auto" else None  # figures are in the model's own precision
        measured = windows.Measured(dense, recipe, held_out, exact, reporter)
        single = by_head(recipe) and wanted != Counts()
        narrower = narrowing.candidates(dense, recipe, tokens, reporter) if narrows(recipe.kind) else {}
        prepared: Mapping[Sublayer, Any] | None = None
        with nullcontext() if single else windows.as_before(dense, recipe, tokens):
            found = windows.limited(dense, recipe, tokens, reporter) if limits(recipe) else None
            judges = judges_of(dense, recipe, tokens, journal, reporter, found=found)
            if narrower:
                chosen, prepared = narrowing.choose(dense, recipe, narrower, reporter)
            elif found is not None and single:
                choice, kept = choose_heads(dense, recipe, judges, found, measured, reporter)
                chosen, found = choice.selection(kept)
            else:
                chosen = choose(judges, recipe, wanted, reporter)
        prepared = found.served if found else prepared
        gone = list(chosen.order)
        if not single and not narrower:
            gone = within_budget(dense, recipe, chosen.order, tokens, held_out, reporter, prepared)
        skipped = _skipped(dense, recipe, tokens, reporter) if recipe.ffn_skip is not None else {}
        judged = recipe.task and not narrower
        tasks = tasks_of(judges, recipe, wanted, Selection(gone, chosen.scores), reporter) if judged else {}
    before = dict.fromkeys(dense.limits, emulation_kind(recipe))
    lessons, carried = None, None
    if recipe.heal == "prune-aware" and found is not None and not dry_run:
        with reporter.stage("tune"):
            lessons = lessons_of(dense, recipe, tokens, held_out, reporter)
            limited, found = choice.selection(aware.all_limited(choice, kept))
            everything = plan_of(limited.order, num_blocks, recipe, before, found)
            kept, carried = aware.tuned(dense, recipe, choice, kept, everything, lessons, output, reporter)
            chosen, found = choice.selection(kept)
        prepared, gone = found.served, list(chosen.order)
    units = {sublayer.block: len(each) for sublayer, each in (prepared or {}).items()} if narrower else None
    plan = plan_of(gone, num_blocks, recipe, before, found, units)
    if skipped:
        prepared = {**(prepared or {}), **skipped}
        plan = replace(plan, removed=dict(sorted({**plan.removed, **dict.fromkeys(skipped, SKIPPING)}.items())))
    what = f"limiting to {windows.listed(plan)} tokens: " if limits(recipe) else f"removing ({recipe.kind}): "
    if gone:
        reporter.say(narrowing.described(plan) if narrower else what + ", ".join(map(str, gone)))
    if plan.full_heads:
        full = [f"{block}.{head}" for block, heads in sorted(plan.full_heads.items()) for head in heads]
        reporter.say("but for the KV heads " + ", ".join(full))
    if plan.windows:
        reporter.say("with windows of " + ", ".join(f"{size} in {block}" for block, size in plan.windows.items()))
    sizes = predicted_bytes(dense, plan, context, fused=recipe.fuse)
    if dry_run:
        reporter.say("predicted: " + describe_bytes(sizes))
        return None
    limits_of_plan = {each: found.served[each] for each in plan.removed if each not in skipped} if found else {}
    if recipe.heal == "none":
        if found is not None and parallel.process()[1] > 1:
            for each in ({}, limits_of_plan):  # while every process measures its share
                measured.loss(each)
        if not parallel.first_goes_on():
            journal.discard()
            return None  # the rest is one process's work
    with reporter.stage("emulate"):
        recovery = recovered(dense, plan, recipe, tokens, reporter, prepared, found)
    if recipe.heal == "prune-aware" and narrower:
        with reporter.stage("tune"):
            lessons = lessons_of(dense, recipe, tokens, held_out, reporter)
            assert prepared is not None
            assert isinstance(recovery, Recovery)
            kept_units, recovery, carried = narrowing.tuned(
                dense, recipe, narrower, prepared, recovery, lessons, output, reporter
            )
        units = {sublayer.block: len(each) for sublayer, each in kept_units.items()}
        plan = plan_of([Unit(block, "ffn") for block in units], num_blocks, recipe, before, None, units)
        sizes = predicted_bytes(dense, plan, context)
        reporter.say(narrowing.described(plan))
    healing = None
    if not isinstance(recovery, Fusion) and recipe.heal != "none":
        with reporter.stage("heal"):
            lessons = lessons or lessons_of(dense, recipe, tokens, held_out, reporter)
            recovery, healing = healed(dense, plan, recovery, lessons, output, reporter, found, carried)
    if not parallel.first_goes_on():
        journal.discard()
        return None
    with reporter.stage("export"), atomic_directory(output) as directory:
        if found is not None and healing is None and not recovery.weights and not skipped:
            quality = _measured(measured, limits_of_plan, held_out)
            apply_recovery(dense.model, dense.family, plan, recovery)
        elif not dense.residency.keeps_blocks:
            assert isinstance(recovery, Recovery)
            quality = _measure_and_cut(dense, plan, recovery, held_out)
        else:
            quality = _cut_and_measure(dense, plan, recovery, held_out, recipe, measured, reporter)
        if healing is not None:
            quality["healing"] = healing
        if plan.units:
            quality["ffn_units"] = {str(block): units for block, units in sorted(plan.units.items())}
        if plan.full_heads:
            quality["full_heads"] = {str(block): list(heads) for block, heads in sorted(plan.full_heads.items())}
        if plan.windows:
            quality["windows"] = {str(block): size for block, size in sorted(plan.windows.items())}
        manifest = Manifest(
            shoal_version=pruning.__version__,
            base={"model": dense.name, "weight_hash": dense.weight_hash, "dtype": str(dense.model.dtype)[6:]},
            recipe=recipe.model_dump(mode="json"),
            num_blocks=num_blocks,
            removed={str(s): _label(kind, recipe) for s, kind in plan.removed.items()},
            importance=table_of(chosen.scores, narrowing.SCORED if narrower else recipe.metric),
            quality=quality | ({"tasks": tasks} if tasks else {}),
            sizes=sizes,
            stages=dict(reporter.stages),
            files={},
        )
        if dense.earlier is not None:
            manifest = continued(manifest, dense.earlier)
        whole = not recovery.weights and not changes_weights(manifest.removed.values())
        shared = untouched(dense, manifest, recipe.dtype) if whole else None
        taken = None
        if not whole and not dense.residency.keeps_blocks:
            assert isinstance(recovery, Recovery)
            taken = copied(dense, plan, recovery.weights, manifest)
        pruned = PrunedModel.of(dense.model, dense.family, dense.directory, shared, taken)
        if (reason := format_named(recipe.format).refusal(pruned)) is not None:
            raise RecipeError(f"--format {recipe.format}: {reason}")
        manifest.sizes["weights"] = format_named(recipe.format).write(pruned, directory)
        if format_named(recipe.format).weights:
            copy_companions(dense.directory, directory)
        write_card(directory, manifest)
        write_report(directory, manifest)
        hashes = known_hashes(shared or taken, directory)
        write_manifest(directory, manifest, hashes)
    with reporter.stage("verify"):
        manifest = verify(output, hashes)
    journal.discard()
    for state in healing_states(output):
        state.unlink(missing_ok=True)
    _say_what_was_made(dense, recipe, manifest, output, reporter)
    return manifest


def _skipped(dense: DenseModel, recipe: Recipe, tokens: Tensor, reporter: Reporter) -> dict[Sublayer, Any]:
    """How many tokens skip each FFN."""
    assert recipe.ffn_skip is not None
    evaluator = Evaluator(dense.model, dense.family, tokens)
    blocks = len(evaluator.blocks)
    runs = round(parse_share(recipe.ffn_skip, "ffn-skip") * blocks * tokens.numel())
    found = predicted(evaluator, skippable(recipe, blocks), recipe.rank, recipe.seed, reporter)
    chosen = chosen_skips(found, runs)
    shares = ", ".join(f"{each} {share.tokens / tokens.numel():.0%}" for each, share in chosen.items())
    reporter.say(f"tokens that skip FFNs: {shares}")
    reporter.say(f"predicted loss increase: {cost(found, runs):.4f} nats per token, each FFN alone")
    return dict(chosen)


def _say_what_was_made(
    dense: DenseModel, recipe: Recipe, manifest: Manifest, output: Path, reporter: Reporter
) -> None:  # fmt: skip
    """Five lines: bytes, perplexity, hidden codes where they were asked for, time, and what to type next."""
    quality, form = manifest.quality, format_named(recipe.format)
    reporter.say(f"wrote {output}: {describe_bytes(manifest.sizes)}")
    ratio = perplexity_ratio(quality["dense_loss"], quality["pruned_loss"])
    rows = f"rows of {quality['row_tokens']} tokens of held-out {_text_of(recipe)}"
    than = "dense" if dense.earlier is None or dense.earlier.whole else f"{dense.name}, which it was made of"
    reporter.say(f"perplexity on {rows}: {ratio:.4f} times {than}")
    if "ffn_skipped" in quality:
        reporter.say(f"FFN runs skipped on the same rows: {quality['ffn_skipped']['share']:.1%}")
    if "codes" in quality:
        mine, theirs = quality["codes"], quality["codes_dense"]
        how_many = f"{mine['found']} of {mine['asked']} found (dense {theirs['found']})"
        reporter.say(f"codes hidden in {mine['length']} tokens: {how_many}")
    estimated = duration(reporter.estimate or 0)
    reporter.say(
        f"time: {duration(reporter.seconds)} (estimated {estimated}), peak memory {reporter.peak_mebibytes} MiB"
    )
    if not form.weights:
        reporter.say(f"serve it: prune-serve {dense.directory} --plan {output}")
    elif recipe.format == "shoal":
        reporter.say(f"serve it: prune-serve {output}")
    else:
        reporter.say(f"who reads it: {form.help}")


def _text_of(recipe: Recipe) -> str:
    """What the text is, for people."""
    if recipe.calibration or not limits(recipe):
        return "text"
    return "text (of the package; give --calibration FILE for yours)"


def _label(kind: EmulationKind, recipe: Recipe) -> str:
    """What `pruning.json` says of a removed sublayer: the kind of its emulation."""
    return "fused" if recipe.fuse and kind != "none" else kind


TEXT = "held-out calibration windows"


def _measured(measured: windows.Measured, limits_of_plan: Mapping[Sublayer, Any], held_out: Tensor) -> dict[str, Any]:
    """Quality of limits, of which much is known from the choice, and of the dense model."""
    quality: dict[str, Any] = {"text": TEXT, "row_tokens": held_out.shape[1]}
    quality |= {"dense_loss": measured.loss({}), "pruned_loss": measured.loss(limits_of_plan)}
    if (codes := measured.codes({})) is not None:
        quality |= {"codes_dense": codes, "codes": measured.codes(limits_of_plan)}
    check_numbers({name: quality[name] for name in ("dense_loss", "pruned_loss")}, "held-out text")
    return quality


def _cut_and_measure(
    dense: DenseModel, plan: Plan, recovery: Recovery | Fusion, held_out: Tensor, recipe: Recipe,
    measured: windows.Measured, reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Make the dense model the pruned one, in place; quality before and after."""
    family: Family = dense.family
    batch = max(1, MEASURED_BATCH_TOKENS // held_out.shape[1])
    quality: dict[str, Any] = {"text": TEXT, "row_tokens": held_out.shape[1]}
    codes = None
    if limits(recipe):
        quality["dense_loss"], codes = measured.loss({}), measured.codes({})
    else:
        evaluator = Evaluator(dense.model, family, held_out, batch)
        in_part = plan.units or any(map(skips, plan.removed.values()))
        plans = [{}, *([] if in_part else [dict.fromkeys(plan.removed)])]
        quality |= zip(("dense_loss", "removed_loss"), evaluator.values(plans).mean(1).tolist(), strict=False)
    apply_recovery(dense.model, family, plan, recovery)
    emulations = {} if isinstance(recovery, Fusion) else recovery.emulations
    with counting(emulations, plan.num_blocks) as rates:
        quality["pruned_loss"] = loss(dense.model, family, held_out, batch)
    quality |= {"ffn_skipped": rates} if rates else {}
    if codes is not None:
        quality |= {"codes_dense": codes, "codes": windows.found_codes(dense, recipe, reporter)}
    check_numbers({name: value for name, value in quality.items() if isinstance(value, float)}, "held-out text")
    return quality


def _measure_and_cut(dense: DenseModel, plan: Plan, recovery: Recovery, held_out: Tensor) -> dict[str, Any]:
    """As `_cut_and_measure`, of removal from a model whose blocks are read one at a time; all plans in one reading."""
    assert dense.residency.dtype is not None
    as_stored(recovery.emulations, dense.residency.dtype)
    batch = max(1, MEASURED_BATCH_TOKENS // held_out.shape[1])
    evaluator = Evaluator(dense.model, dense.family, held_out, batch, residency=dense.residency)
    plans: list[Mapping[Sublayer, Any]] = [{}, dict.fromkeys(plan.removed), recovery.emulations]
    if recovery.weights:
        values = evaluator.values(plans[:2]).mean(1).tolist()
        dense.residency.change(recovery.weights)
        values.append(float(evaluator.loss(recovery.emulations).mean()))
    else:
        values = evaluator.values(plans).mean(1).tolist()
    found = dict(zip(("dense_loss", "removed_loss", "pruned_loss"), values, strict=True))
    check_numbers(found, "held-out text")
    apply_plan(dense.model, dense.family, plan, recovery.emulations)
    return {"text": TEXT, "row_tokens": held_out.shape[1], **found}


def score(request: Request, output: Path | None, *, units: Sequence[UnitKind], reporter: Reporter) -> None:
    """Score units without pruning: a table on stdout and, if `output` is given, JSON.

    Raises:
        UserError: What could not be known before the model was loaded.
    """
    quiet_libraries()
    join(reporter)
    source, recipe = request.source, request.recipe
    with reporter.stage("load"):
        dense = opened(source, recipe)
    with reporter.stage("calibrate"):
        tokens, _ = calibrate(dense, recipe, reporter)
    every = [Unit(b, kind) for kind in units for b in range(source.num_blocks) if b not in recipe.keep]
    sampling = Sampling(recipe.seed, recipe.draws, max(1, len(every) // 3))
    with reporter.stage("score"), forwards(dense, recipe):
        journal = journal_of(output, dense, recipe)
        judges = judges_of(dense, recipe, tokens, journal, reporter)
        scores = selection.score(judges, every, recipe.metric, sampling, reporter)
    if parallel.process()[0] == 0:
        print(score_table(scores[""].values, scores[""].errors, metric(recipe.metric).unit))
        if output is not None:
            _write_scores(output, recipe, dense, table_of(scores, recipe.metric))
    journal.discard()


def _write_scores(output: Path, recipe: Recipe, dense: DenseModel, table: Mapping[str, Any]) -> None:
    document = {
        "shoal_version": pruning.__version__, "model": dense.name, "weight_hash": dense.weight_hash,
        "recipe": recipe.model_dump(mode="json"), "importance": table,
    }  # fmt: skip
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error.strerror or error}") from error
