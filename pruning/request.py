"""What was asked for, found and checked before torch is loaded: recipe, model, texts and paths, cheap before dear."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.budget import (
    HELD_OUT_WINDOWS,
    Cached,
    Counts,
    check,
    counts,
    for_target,
    held_out_rows,
    most_skipped,
    resolved,
)
from pruning.console import Reporter
from pruning.errors import ModelError, RecipeError
from pruning.evaluation.questions import holds_questions, parse_task, read_questions
from pruning.export.formats import format_named
from pruning.families import head_dim, own_window
from pruning.importance import metric
from pruning.models.chain import Earlier
from pruning.models.finding import Source, find_model
from pruning.models.memory import FitWork, Work, needed
from pruning.models.weight_files import weight_files
from pruning.plan import KINDS, Kind, Sublayer, UnitKind, parse_bytes, parse_share
from pruning.recipe import Emulation, Recipe, emulation_kind, limits, recalibrates
from pruning.texts.reading import read_text
from pruning.variants import (
    REMOVED,
    SKIPPING,
    cache_of,
    changes_weights,
    full_heads_of,
    narrows,
    positions_of,
    reads,
    row,
    streams,
    variant,
)
from pruning.workdir import check_output

NUMBER_BYTES = {"bfloat16": 2, "float16": 2}
"""Of a dtype that keys and values are cached in, or that is computed in; others: 4."""
FIT_ROWS = 4  # that go through a block together where adapters are fitted (forward/evaluator.py)
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request that can be carried out.

    Attributes:
        source: The model, not yet loaded.
        recipe: With all that it left open named.
        wanted: How much goes.
    """

    source: Source
    recipe: Recipe
    wanted: Counts


def checked_export(
    model: str, recipe: Recipe, output: Path | None, *, overwrite: bool, reporter: Reporter
) -> Request:  # fmt: skip
    """Check a request to write a checkpoint to `output`; None: it only asks what would be done.

    Raises:
        UserError: What is wrong with it.
    """
    if output is not None:
        check_output(output, overwrite)
    if recipe.format in ("nemotron-nas", "gguf") and 0 not in recipe.keep and not narrows(recipe.kind):
        recipe = recipe.model_copy(update={"keep": [0, *recipe.keep]})  # these formats need block 0's attention
    request = checked(model, recipe, reporter, again=True)
    return Request(request.source, within_memory(request, reporter, exports=True), request.wanted)


def checked(model: str, recipe: Recipe, reporter: Reporter, *, again: bool = False) -> Request:
    """Find the model, resolve the recipe, and refuse what cannot be done before anything costs time.

    Args:
        model: As typed.
        recipe: As asked for.
        reporter: For progress.
        again: Whether it may be a checkpoint.

    Raises:
        UserError: What is wrong with the request.
    """
    scorer = metric(recipe.metric)
    flag = "--task" if recipe.task else "--copying"
    if (recipe.task or recipe.copying) and not scorer.target.startswith("pruning.importance.ablation"):
        raise RecipeError(f"--importance {recipe.metric} sees all tokens alike; with {flag} use leave-one-out, kl, "
                          f"a Shapley value, or leave {flag} out")  # fmt: skip
    if recipe.metric == "task-shapley" and not any(holds_questions(parse_task(text)[0]) for text in recipe.task):
        raise RecipeError("--importance task-shapley needs --task FILE with multiple-choice questions")
    if recipe.stream and recipe.recovery_aware:
        raise RecipeError("--recovery-aware fits emulations, which needs the whole model; leave --stream out")
    if recipe.stream and recipe.fit_precision != "auto":
        raise RecipeError("--stream computes in --dtype; leave --fit-precision out")
    check(recipe)
    if recipe.memory is not None:
        parse_bytes(recipe.memory, "memory")
    _check_texts(recipe)
    plan_alone = limits(recipe) and not format_named(recipe.format).weights
    source = find_model(model, reporter, weights_stay=plan_alone)
    if source.quantised:
        reporter.say(f"note: {model} is quantised ({source.quantised}); what is chosen and measured here computes with "
                     "the numbers that its weights stand for")  # fmt: skip
    if source.earlier is not None:
        recipe = _on_top(source.earlier, recipe, model, again=again)
    recipe = resolved(recipe, source.positions)
    _check_held_out(recipe)
    if recipe.target_tokens is not None:
        recipe = _for_target(source, recipe, reporter)
    cached = _cached(source)
    counts(recipe, source.num_blocks, 0, cached)
    if recipe.rank > source.hidden_size:
        raise RecipeError(f"--rank {recipe.rank} is over the hidden size {source.hidden_size}")
    recipe, own = _sparing(source, recipe)
    wanted = counts(recipe, source.num_blocks, len(own), cached)
    if cached is not None and cache_of(recipe.kind) == "none" and wanted.attention + wanted.blocks >= cached.full:
        raise RecipeError(f"{model} has {cached.full:g} attention layers left, and one must stay; ask for less")
    if recipe.heal == "prune-aware" and wanted == Counts():
        raise RecipeError(f"--heal prune-aware chooses what more to limit of {model}; say how much, or use --heal lora")
    kind = emulation_kind(recipe)
    if kind != REMOVED and row(kind).unit == "attention" and (wanted.ffn or wanted.sublayers):
        raise RecipeError(f"--emulation {recipe.kind} is for attention only; choose another for FFNs")
    if kind != REMOVED:
        variant(kind).check(source.family, source.config)
    if recipe.ffn_skip is not None:
        _check_skipping(source, recipe)
    if not format_named(recipe.format).weights and (changing := weight_changing_flag(recipe, wanted)) is not None:
        raise RecipeError(f"--format {recipe.format} holds no weights, and {changing} changes some; leave it out, "
                          "or use --format shoal")  # fmt: skip
    if recipe.fuse:
        from pruning.recovery.fuse import check_fusable

        check_fusable(source.family, {Sublayer(0, "ffn"): kind})
    return Request(source, recipe, wanted)


def units_to_score(recipe: Recipe, asked: Sequence[UnitKind]) -> Sequence[UnitKind]:
    """The kinds to score; all that there are where none is asked for.

    Raises:
        RecipeError: One cannot become what the recipe says.
    """
    only_attention = limits(recipe)
    if only_attention and (others := [kind for kind in asked if kind != "attention"]):
        raise RecipeError(f"--units {others[0]}: --emulation {recipe.kind} is for attention only")
    return asked or (["attention"] if only_attention else KINDS)


def within_memory(request: Request, reporter: Reporter, *, exports: bool) -> Recipe:
    """The recipe that streams where it has to for `--memory`, or was asked to; what cannot stream is refused.

    Args:
        request: Checked.
        reporter: For progress.
        exports: Whether a checkpoint is written.

    Raises:
        RecipeError: The memory is too small, or the request cannot stream.
    """
    source, recipe = request.source, request.recipe
    reason = _needs_the_whole(request) if exports else None
    if recipe.stream and reason is not None:
        raise RecipeError(f"--stream holds one block at a time, and {reason}; leave it out")
    if recipe.memory is None:
        return recipe
    needs = needed(weight_files(source.directory), source.family, _work(source, recipe))
    given = parse_bytes(recipe.memory, "memory")
    about = f"--memory {recipe.memory}: about {_gib(needs.whole)} with the whole model, {_gib(needs.streamed)} streamed"
    if needs.whole <= given and not recipe.stream:
        reporter.say(f"{about}; the model is loaded as a whole")
        return recipe
    if reason is not None:
        raise RecipeError(f"{about}, and {reason}; give more memory, or ask for less")
    if needs.streamed > given:
        less = "--context, --held-out-tokens and --sequence-length" if limits(recipe) else "--calibration-tokens"
        raise RecipeError(f"{about}; give more, or lower {less}")
    reporter.say(f"{about}; blocks are read from disk one at a time")
    return recipe.model_copy(update={"stream": True})


def _needs_the_whole(request: Request) -> str | None:
    """Why the request cannot be carried out block by block; None where it can."""
    source, recipe = request.source, request.recipe
    if source.earlier is not None:
        return f"{source.name} is pruned already, which only loads as a whole"
    if recipe.heal != "none":
        return f"--heal {recipe.heal} trains, which needs the whole model"
    if recipe.recovery_aware:
        return "--recovery-aware fits emulations while it chooses, which needs the whole model"
    if recipe.fit_precision != "auto":
        return f"--fit-precision {recipe.fit_precision} does not go with it, as blocks are computed in --dtype"
    if recipe.fuse:
        return "--fuse makes FFNs anew, which needs the whole model"
    if not streams(recipe.kind):
        return f"--emulation {recipe.kind} reads several blocks at a time, which needs the whole model"
    form = format_named(recipe.format)
    if limits(recipe):
        if (flag := weight_changing_flag(recipe, request.wanted)) is not None:
            return f"{flag} changes weights beside windows, which needs the whole model"
    elif not form.copies:
        return f"--format {recipe.format} writes weights anew, which needs the whole model"
    if source.fields.get("quantization_config"):
        return f"{source.name} is quantised, which only loads as a whole"
    files = weight_files(source.directory)
    if recipe.dtype != "auto" and files.dtypes != {STORED.get(recipe.dtype)}:
        return f"--dtype {recipe.dtype} writes weights anew, which needs the whole model"
    if len(files.dtypes) > 1:
        return f"the weights of {source.name} have several dtypes, which are written anew"
    return None


def _work(source: Source, recipe: Recipe) -> Work:
    """What a plan runs through the model."""
    sizes: dict[str, int] = {
        "itemsize": NUMBER_BYTES.get(recipe.dtype, 4), "hidden": source.hidden_size, "layers": source.num_blocks,
        "ffn": int(source.config.intermediate_size), "heads": int(source.config.num_attention_heads),
    }  # fmt: skip
    if limits(recipe):
        held, measured = held_out_rows(recipe)
        return Work(row=recipe.row_tokens, rows=max(recipe.fit_tokens, held * measured), measured=measured, **sizes)
    length = recipe.row_tokens
    return FitWork(
        row=FIT_ROWS * length, rows=max(recipe.fit_tokens, recipe.score_tokens), measured=HELD_OUT_WINDOWS * length,
        sources=recipe.sources if reads(recipe.kind) else 0, compensated=recipe.compensate,
        recalibrated=int(source.config.vocab_size) if recalibrates(recipe) else 0, **sizes,
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _check_held_out(recipe: Recipe) -> None:
    """Refuse a number of held-out tokens that is not used as it says."""
    if recipe.held_out_tokens is None:
        return
    if not limits(recipe):
        raise RecipeError(f"--held-out-tokens is for windows, and this asks for {recipe.kind}; leave it out")
    changed = recipe.compensate or recipe.recalibrate or recipe.heal != "none" or recipe.ffn_skip is not None
    if changed and recipe.held_out_tokens < (recipe.context or 0):
        raise RecipeError(f"--held-out-tokens {recipe.held_out_tokens} is less than the context of {recipe.context} "
                          "tokens, at which a plan that changes more than windows is measured; give more")  # fmt: skip


def _check_skipping(source: Source, recipe: Recipe) -> None:
    """Refuse FFNs that tokens cannot skip, a format that cannot hold it, and more than can be spared."""
    assert recipe.ffn_skip is not None
    if source.earlier is not None:
        raise RecipeError(f"--ffn-skip needs the dense model, and {source.name} is pruned already; leave it out")
    variant(SKIPPING).check(source.family, source.config)
    if not format_named(recipe.format).adapters:
        raise RecipeError(f"--format {recipe.format} holds no FFNs that tokens skip; use --format shoal or plan")
    most = most_skipped(recipe, source.num_blocks)
    if parse_share(recipe.ffn_skip, "ffn-skip") > most:
        raise RecipeError(f"--ffn-skip {recipe.ffn_skip} is out of reach: the first and the last block and the first "
                          f"tokens skip nothing, so {most:.1%} can go")  # fmt: skip


def _on_top(earlier: Earlier, recipe: Recipe, model: str, *, again: bool) -> Recipe:
    """The recipe for a checkpoint: what was changed is left alone, and what is limited has one window.

    Raises:
        ModelError: A dense model is needed.
        RecipeError: It cannot be done to this checkpoint.
    """
    if not again:
        raise ModelError(f"{model} is pruned already; this needs the dense model that it was made from")
    if earlier.whole and not limits(recipe):
        raise RecipeError(f"{model} has windows, and only more of them go beside these; give the dense model instead, "
                          f"or leave out what asks for {recipe.kind}")  # fmt: skip
    if earlier.whole and recipe.window not in (None, earlier.window):
        raise RecipeError(f"--window {recipe.window}: the layers of {model} have windows of {earlier.window} tokens; "
                          "leave it out")  # fmt: skip
    amounts = (recipe.attention, recipe.ffn, recipe.blocks, recipe.sublayers, recipe.kv_budget, recipe.weight_budget)
    if recipe.heal != "none" and not earlier.whole and set(amounts) == {None} and recipe.max_loss_increase is None:
        raise RecipeError(f"{model} does not hold the dense model that healing learns from; ask for more to go, or "
                          "prune and heal the dense model")  # fmt: skip
    others = {recipe.blocks, recipe.sublayers, recipe.weight_budget} != {None}
    kinds: list[Kind] = ["attention", "ffn"] if others or (recipe.ffn and recipe.attention) else ["attention"]
    if recipe.ffn and not others and not recipe.attention:
        kinds = ["ffn"]
    update: dict[str, Any] = {"keep": sorted({*recipe.keep, *earlier.changed(kinds)})}
    if earlier.whole:
        sizes = recipe.window_sizes or earlier.manifest.recipe.get("window_sizes")
        update |= {"window": earlier.window, "window_sizes": sizes}
    return recipe.model_copy(update=update)


def _cached(source: Source) -> Cached | None:
    """What the attention layers of a checkpoint keep; None for a dense model."""
    if source.earlier is None:
        return None
    changed = len(source.earlier.changed(["attention"]))
    own = sum(own_window(source.config, block) is not None for block in range(source.num_blocks))
    each, usual = source.config.num_key_value_heads, source.earlier.window or 1
    entries = [entry for sublayer, entry in source.earlier.entries.items() if sublayer.kind == "attention"]
    full = sum(len(full_heads_of(entry)) for entry in entries) / each
    windows = [(positions_of(entry) or 0) * (each - len(full_heads_of(entry))) for entry in entries]
    limited = sum(windows) / (each * usual) if source.earlier.whole else 0
    return Cached(source.num_blocks - changed - own + full, limited, source.earlier.manifest.num_blocks - own)


def weight_changing_flag(recipe: Recipe, wanted: Counts) -> str | None:
    """The flag by which weights of the dense model go or change; None: they all stay as they are."""
    kind = emulation_kind(recipe)
    if changes_weights([kind]):
        return f"--emulation {recipe.kind}"
    flags = {
        "--blocks": wanted.blocks and row(kind).unit != "block",
        "--compensate": recipe.compensate,
        "--recalibrate": recipe.recalibrate,
        "--fuse": recipe.fuse,
        f"--heal {recipe.heal}": recipe.heal not in ("none", "adapters"),
    }
    return next((flag for flag, given in flags.items() if given), None)


def _sparing(source: Source, recipe: Recipe) -> tuple[Recipe, list[int]]:
    """The recipe that leaves layers with a window by design alone, where attention is limited; and those layers."""
    if not limits(recipe):
        return recipe, []
    own = [block for block in range(source.num_blocks) if own_window(source.config, block)]
    return recipe.model_copy(update={"keep": sorted({*recipe.keep, *own})}), own


def _for_target(source: Source, recipe: Recipe, reporter: Reporter) -> Recipe:
    """The recipe with its memory for so many tokens as a share of the KV cache, which is printed."""
    config, context = source.config, recipe.context or 0
    dtype = (
        recipe.dtype if recipe.dtype != "auto" else str(source.fields.get("dtype", source.fields.get("torch_dtype")))
    )
    layer_bytes = 2 * config.num_key_value_heads * head_dim(config) * NUMBER_BYTES.get(dtype, 4)
    windows = [own_window(config, block) for block in range(source.num_blocks)] if limits(recipe) else []
    own = [min(window, context) / context for window in windows if window]
    found = for_target(recipe, layer_bytes, source.num_blocks - len(own), sum(own))
    reporter.say(
        f"{recipe.target_tokens:,} tokens in {recipe.kv_memory} (keys and values in {dtype}): "
        f"{found.kv_budget} of the KV cache stays"
    )
    return found


def _check_texts(recipe: Recipe) -> None:
    for path in recipe.calibration:
        read_text(path)
    for path, _ in map(parse_task, recipe.task):
        if holds_questions(path):
            read_questions(path)
        else:
            read_text(path)


@dataclass(frozen=True, slots=True)
class Curves:
    """What to sweep.

    Attributes:
        choosers: Metrics, or `greedy`.
        emulations: What takes their place.
        judge: Text to judge on; held-out calibration text by default.
        judge_tokens: Of it.
        choice: Multiple-choice files to judge on as well.
        limit: Questions of each.
    """

    choosers: Sequence[str]
    emulations: Sequence[Emulation]
    judge: Path | None = None
    judge_tokens: int = 8192
    choice: Sequence[Path] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """A sweep that can be carried out.

    Attributes:
        source: The model, not yet loaded.
        recipe: With all that it left open named.
        curves: What to sweep.
        budgets: Attention layers to remove, ascending.
    """

    source: Source
    recipe: Recipe
    curves: Curves
    budgets: Sequence[int]


def checked_sweep(
    model: str, recipe: Recipe, curves: Curves, attention: str, output: Path, *, overwrite: bool, reporter: Reporter
) -> SweepRequest:
    """Check a request for curves.

    Raises:
        UserError: What is wrong with it.
    """
    check_output(output, overwrite)
    for name in curves.choosers:
        metric(recipe.metric if name == "greedy" else name)
    for path in curves.choice:
        read_questions(path, curves.limit)
    for path in [*recipe.calibration, *([curves.judge] if curves.judge else [])]:
        read_text(path)
    for name in curves.emulations:
        if name != REMOVED and row(name).unit == "block":
            raise RecipeError(f"--emulations {name}: a sweep removes attention, and {name} replaces whole blocks")
        if name != REMOVED and row(name).unit == "ffn":
            how = "--weight-budget" if narrows(name) else "--ffn-skip"
            raise RecipeError(f"--emulations {name}: a sweep removes attention; prune with {how} for FFNs")
        if cache_of(name) == "window":
            raise RecipeError(f"--emulations {name}: a sweep removes attention; prune with --kv-budget for windows")
    source = find_model(model, reporter)
    if source.earlier is not None:
        raise ModelError(f"{model} is pruned already; a sweep needs the dense model that it was made from")
    budgets = parse_budgets(attention, source.num_blocks - len(set(recipe.keep)))
    return SweepRequest(source, resolved(recipe, source.positions), curves, budgets)


def parse_budgets(text: str, num_blocks: int) -> list[int]:
    """`0..20`, `0..20/5` (every fifth) or `2,4,8`, ascending.

    Raises:
        RecipeError: Malformed, or none of the attention would be left.
    """
    if match := re.fullmatch(r"(\d+)\.\.(\d+)(?:/(\d+))?", text.strip()):
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
        found = list(range(first, last + 1, max(1, step)))
    elif re.fullmatch(r"\d+(,\d+)*", text.strip()):
        found = sorted({int(part) for part in text.split(",")})
    else:
        raise RecipeError(f"--attention {text!r} is not a range such as 0..20, 0..20/5 or 2,4,8")
    if not found or found[-1] >= num_blocks:
        raise RecipeError(f"--attention {text}: the model has {num_blocks} attention sublayers and one must stay")
    return found
