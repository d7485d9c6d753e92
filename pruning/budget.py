"""How much goes: a recipe's amounts and budgets, resolved against a model, and what contradicts what."""

import math
from dataclasses import dataclass
from typing import Any

from pruning.errors import RecipeError
from pruning.plan import FIRST_TOKENS, layers_within, parse_amount, parse_bytes, parse_share, window_part
from pruning.recipe import FIT_TOKENS, KV_BUDGET, SHORT_ROW_TOKENS, Recipe, by_head, limits
from pruning.variants import REMOVED, cache_of, narrows, row, skips

LONG_ROW_TOKENS, CHOICE_TOKENS = 1024, 6144  # for windows: as large a share of a row as of the context
NARROW_TOKENS = 65536  # for narrower FFNs: a refit has as many regressors as there are units
SKIP_TOKENS = 8192  # for predictors of what an FFN changes
HELD_OUT_WINDOWS = 8  # rows that adapters are measured on at the end
HELD_OUT_TOKENS = 8192  # that a window plan is measured on at the end
LONGEST_CONTEXT = 8192  # that a budget counts where nothing else is asked for
WINDOW_SHARE = 8  # the context is so many windows long where nothing else is asked for
WINDOW_SIZES = (0.5, 1.0, 2.0)  # of the usual window, that layers may have where one size is not asked for
SEVERAL_SIZES_UNDER, SMALLER_SIZES_UNDER = 0.3, 0.2  # of the cache; above, they do not pay (decisions/windows.md)
LONG_WINDOW = 1024  # but for shorter windows, of which some are too short for what is close by
SMALL_FROM = 0.02  # nats per token; where so much is allowed, a small share of the cache is likely
LIMITED_SHARE = 0.85  # of a small budget, that the usual window takes at most where windows have several sizes
SMALL_BUDGET, SMALL_WINDOW = 0.2, 0.6  # the same for windows of one size, under this share of the cache
WINDOW_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Counts:
    """How many sublayers of each kind, of either kind, and whole blocks, to remove."""

    attention: int = 0
    ffn: int = 0
    blocks: int = 0
    sublayers: int = 0


def resolved(recipe: Recipe, model_context: int) -> Recipe:
    """The recipe with its context and its window named.

    Args:
        recipe: As asked for.
        model_context: Tokens that the model takes.

    Raises:
        RecipeError: The model takes no such context, or the window is no shorter.
    """
    if recipe.context is not None and recipe.context > model_context:
        raise RecipeError(f"--context {recipe.context}: the model takes at most {model_context} tokens")
    context = recipe.context or min(model_context, LONGEST_CONTEXT)
    window = recipe.window or _window(recipe, context) if limits(recipe) else None
    if window is not None and window >= context:
        raise RecipeError(f"--window {window} is no shorter than the context of {context} tokens: nothing is saved")
    length = recipe.sequence_length or (SHORT_ROW_TOKENS if window is None else min(context, LONG_ROW_TOKENS))
    usual = FIT_TOKENS if window is None else max(length, CHOICE_TOKENS)
    usual = NARROW_TOKENS if narrows(recipe.kind) else SKIP_TOKENS if skips(recipe.kind) else usual
    tokens = recipe.calibration_tokens or usual
    sizes = recipe.window_sizes or ("auto" if by_head(recipe) and recipe.window is None else "one")
    named: dict[str, Any] = {
        "context": context,
        "window": window,
        "window_sizes": sizes if limits(recipe) else None,
        "sequence_length": length,
        "calibration_tokens": tokens,
    }
    return recipe.model_copy(
        update={**named, "emulation": recipe.kind, "importance": recipe.metric, "samples": recipe.draws}
    )


def _window(recipe: Recipe, context: int) -> int:
    """Positions of the usual window where none is asked for: an eighth of the context, less where that leaves no heads.

    Under a fifth of the cache a few more full heads are worth more than the rest of the window (decisions/windows.md);
    where layers may have half the window, from a seventh on.
    """
    usual = max(2, context // WINDOW_SHARE)
    if recipe.kv_budget is None or not by_head(recipe):
        return usual
    share = parse_share(recipe.kv_budget, "kv-budget")
    several = recipe.window_sizes != "one"
    if share >= SMALL_BUDGET and not several:
        return usual
    size = int((LIMITED_SHARE if several else SMALL_WINDOW) * share * context)
    return max(2, min(usual, size - size % WINDOW_MULTIPLE if size >= 4 * WINDOW_MULTIPLE else size))


def check(recipe: Recipe) -> None:
    """Refuse what no model can be asked for.

    Raises:
        RecipeError: An amount is malformed, says nothing, or contradicts another.
    """
    amounts = _amounts(recipe)
    _refuse_contradictions(recipe, amounts)
    for kind, amount in amounts.items():
        parse_amount(amount, None, kind)
    if recipe.kv_memory is not None:
        parse_bytes(recipe.kv_memory)
    budgets = {"kv-budget": recipe.kv_budget, "weight-budget": recipe.weight_budget, "ffn-skip": recipe.ffn_skip}
    for flag, share in budgets.items():
        if share is not None:
            parse_share(share, flag)


def window_sizes(recipe: Recipe, share: float | None = None) -> tuple[float, ...]:
    """Sizes of windows that a plan may have, as shares of the usual one.

    Args:
        recipe: Resolved.
        share: Of the KV cache that the plan keeps; by default what the recipe asks for, or is likely to find.
    """
    if share is None and recipe.kv_budget is not None:
        share = parse_share(recipe.kv_budget, "kv-budget")
    elif share is None:
        share = 0.0 if (recipe.max_loss_increase or 0) >= SMALL_FROM else SEVERAL_SIZES_UNDER
    assert recipe.window is not None
    assert recipe.context is not None
    long = recipe.window >= LONG_WINDOW
    if recipe.window_sizes == "one" or (recipe.window_sizes == "auto" and long and share >= SEVERAL_SIZES_UNDER):
        return (1.0,)
    sizes = WINDOW_SIZES if share < SMALLER_SIZES_UNDER else [size for size in WINDOW_SIZES if size >= 1]
    return tuple(size for size in sizes if size * recipe.window < recipe.context)


def held_out_rows(recipe: Recipe) -> tuple[int, int]:
    """How many rows the result is measured on, and their tokens: a context, or all tokens where they are fewer."""
    assert recipe.context is not None
    tokens = recipe.held_out_tokens or max(recipe.context, HELD_OUT_TOKENS)
    return max(1, tokens // recipe.context), min(tokens, recipe.context)


def least_share(recipe: Recipe) -> float:
    """Share of its cache that a layer keeps with the smallest window."""
    assert recipe.window is not None
    smallest = min(window_sizes(recipe, 0.0))
    return window_part(recipe.window, smallest) / (recipe.context or LONGEST_CONTEXT)


def for_target(recipe: Recipe, layer_bytes: int, layers: int, own: float = 0.0) -> Recipe:
    """The recipe with the budget that lets `--kv-memory` hold `--target-tokens`, in the place of these two.

    Args:
        recipe: Resolved.
        layer_bytes: KV cache bytes of one token in one layer.
        layers: Attention layers that the budget is shared by.
        own: What layers with a window by design keep besides, in layers: the sum of their windows over the context.

    Raises:
        RecipeError: The dense model holds so many tokens already, or no plan does.
    """
    assert recipe.target_tokens is not None
    assert recipe.kv_memory is not None
    least = least_share(recipe) if limits(recipe) else 1 / layers
    least = math.ceil(least * 1e6) / 1e6
    fits = parse_bytes(recipe.kv_memory) / layer_bytes  # tokens of one layer
    share = math.floor((fits / recipe.target_tokens - own) / layers * 1e6) / 1e6
    asked = f"--target-tokens {recipe.target_tokens} in {recipe.kv_memory}"
    if share >= 1:
        raise RecipeError(f"{asked}: the dense model holds {int(fits / (layers + own)):,}; nothing needs to go")
    if share < least:
        most = int(fits / (layers * least + own))
        shortest = round(least * (recipe.context or LONGEST_CONTEXT))
        what = f"every layer limited to {shortest} tokens" if limits(recipe) else "one attention layer left"
        less = "a smaller --window or " if limits(recipe) else ""
        raise RecipeError(f"{asked} is out of reach: {most:,} fit with {what}; give {less}more --kv-memory")
    return recipe.model_copy(update={"kv_budget": f"{share:.4%}", "target_tokens": None, "kv_memory": None})


def _amounts(recipe: Recipe) -> dict[str, str | int]:
    given = {
        "attention": recipe.attention, "ffn": recipe.ffn, "blocks": recipe.blocks, "sublayers": recipe.sublayers
    }  # fmt: skip
    return {kind: amount for kind, amount in given.items() if amount is not None}


@dataclass(frozen=True, slots=True)
class Cached:
    """What attention layers keep in the KV cache of a model that was pruned before.

    Attributes:
        full: Layers that keep every token; a layer of which some KV heads do counts in part.
        limited: Layers that keep a window.
        dense: Layers of the dense model, which shares are of.
    """

    full: float
    limited: float
    dense: int


def counts(recipe: Recipe, num_blocks: int, sliding: int = 0, cached: Cached | None = None) -> Counts:
    """Resolve the recipe's amounts against a model; a budget in loss or weights is an upper bound here.

    Args:
        recipe: Resolved.
        num_blocks: L.
        sliding: Attention layers that have a window by design; a share of the KV cache is one of the others'.
        cached: Of a model that was pruned before; healing it takes nothing more.

    Raises:
        RecipeError: An amount is malformed, out of range, contradicts another, or leaves no attention layer.
    """
    amounts = _amounts(recipe)
    free = num_blocks - len(set(recipe.keep))
    _refuse_contradictions(recipe, amounts)
    if outside := [block for block in recipe.keep if not 0 <= block < num_blocks]:
        raise RecipeError(f"--keep {outside[0]}: blocks are 0 to {num_blocks - 1}")
    if recipe.kv_budget is not None:
        amounts["attention"] = _limited_within(recipe, num_blocks - sliding, cached)
    elif recipe.max_loss_increase is not None:
        amounts["attention"] = min(free, num_blocks - 1)
    elif recipe.weight_budget is not None:
        parse_share(recipe.weight_budget, "weight-budget")
        if narrows(recipe.kind):
            amounts["ffn"] = free  # of each a part
        else:
            amounts["sublayers"] = min(2 * free, 2 * num_blocks - 2)
    elif not amounts and (skips(recipe.kind) or (cached is not None and recipe.heal != "none")):
        return Counts()
    elif not amounts and limits(recipe):
        default = recipe.model_copy(update={"kv_budget": KV_BUDGET})
        amounts["attention"] = _limited_within(default, num_blocks - sliding, cached)
    elif not amounts:
        amounts["attention"] = "33%"
    if cached is not None and by_head(recipe):
        return Counts(attention=int(amounts["attention"]))  # heads of layers that were limited in part may go too
    totals = {"sublayers": 2 * num_blocks}
    result = Counts(**{k: parse_amount(v, totals.get(k, num_blocks), k) for k, v in amounts.items()})
    no_cache = cache_of(recipe.kind) == "none"
    if (no_cache and result.attention + result.blocks >= num_blocks) or result.sublayers >= 2 * num_blocks - 1:
        gone = min(num_blocks, result.attention + result.blocks + result.sublayers)
        raise RecipeError(f"{gone} of {num_blocks} attention layers would go; at least one must stay")
    if result.ffn + result.blocks > num_blocks:
        raise RecipeError(
            f"{result.ffn + result.blocks} of {num_blocks} FFN layers would go; there are only {num_blocks}"
        )
    if max(result.attention, result.ffn) + result.blocks > free or result.sublayers > 2 * free:
        raise RecipeError(f"--keep leaves only {free} blocks to remove from; ask for less")
    return result


def _limited_within(recipe: Recipe, num_blocks: int, cached: Cached | None) -> int:
    """Attention layers that have to be limited or removed for the recipe's share of the KV cache."""
    assert recipe.kv_budget is not None
    context = recipe.context or LONGEST_CONTEXT
    left = (recipe.window or 0) / context
    least = least_share(recipe) if limits(recipe) else left
    share = parse_share(recipe.kv_budget, "kv-budget")
    count, at_least = layers_within(share, num_blocks, left), layers_within(share, num_blocks, least)
    if cached is not None:
        used = cached.full + cached.limited * left
        if used <= share * cached.dense:
            raise RecipeError(
                f"--kv-budget {recipe.kv_budget}: the checkpoint keeps {used / cached.dense:.1%} of the dense model's "
                "KV cache already; ask for less, or --heal it"
            )
        count = at_least = math.ceil((used - share * cached.dense) / (1 - left) - 1e-9)
        num_blocks = math.ceil(cached.full)
    if at_least > num_blocks:
        raise RecipeError(
            f"--kv-budget {recipe.kv_budget}: with every layer limited to {round(least * context)} of {context} "
            f"tokens, {least:.1%} stays; give a smaller --window"
        )
    return min(count, num_blocks)


def _refuse_contradictions(recipe: Recipe, amounts: dict[str, str | int]) -> None:
    budgets = {
        "--kv-budget": recipe.kv_budget,
        "--weight-budget": recipe.weight_budget,
        "--max-loss-increase": recipe.max_loss_increase,
        "--target-tokens": recipe.target_tokens,
    }
    if (recipe.target_tokens is None) != (recipe.kv_memory is None):
        raise RecipeError("--target-tokens and --kv-memory go together: so many tokens in so much memory")
    named = [flag for flag, value in budgets.items() if value is not None]
    if narrows(recipe.kind):
        _refuse_with_narrower_ffns(recipe, [*named, *(f"--{kind}" for kind in amounts)])
    if recipe.ffn_skip is not None or skips(recipe.kind):
        _refuse_with_skipped_ffns(recipe, [*named, *(f"--{kind}" for kind in amounts)])
    if len(named) > 1 or (named and amounts):
        both = [*named, *(f"--{kind}" for kind in amounts)][:2]
        raise RecipeError(f"{both[0]} and {both[1]} both say how much goes; give one")
    if "sublayers" in amounts and len(amounts) > 1:
        raise RecipeError("--sublayers ranks both kinds together; leave --attention, --ffn and --blocks out")
    if recipe.format == "llama" and set(amounts) != {"blocks"}:
        raise RecipeError("--format llama holds whole blocks only; ask for --blocks N, or for --format shoal")
    if (
        recipe.format in ("nemotron-nas", "gguf")
        and not recipe.fuse
        and recipe.kind != REMOVED
        and not narrows(recipe.kind)
        and set(amounts) != {"blocks"}
    ):
        raise RecipeError(f"--format {recipe.format} holds no adapters; add --fuse, or choose --emulation none")
    if recipe.fuse and recipe.max_loss_increase is not None:
        raise RecipeError("--max-loss-increase measures adapters, which --fuse refits; leave one of them out")
    if {*named} & {"--weight-budget", "--max-loss-increase"} and recipe.search not in ("rank", "greedy"):
        raise RecipeError(f"{named[0]} needs an order of removal: --search rank or greedy, not {recipe.search}")
    if recipe.search == "consecutive" and (set(amounts) != {"blocks"} or recipe.keep):
        raise RecipeError("--search consecutive removes a run of whole blocks: ask for --blocks N, without --keep")
    if recipe.window_by == "head" and not by_head(recipe):
        how = "--importance aumann-shapley, --search rank or exchange, and a KV budget or a loss"
        raise RecipeError(f"--window-by head needs windows that are chosen with {how}; leave it out, or what differs")
    if recipe.tensor_parallel > 1 and recipe.search == "exchange":
        raise RecipeError(
            "--search exchange swaps single heads, which --tensor-parallel forbids; leave one of them out"
        )
    if recipe.recovery_aware and recipe.kind == REMOVED:
        raise RecipeError("--recovery-aware judges plans with their emulation; choose an --emulation")
    whole = recipe.kind != REMOVED and row(recipe.kind).unit == "block"
    if whole:
        _refuse_with_whole_blocks(recipe, set(amounts))
    unshared = set(amounts) == {"blocks"} and not whole
    if recipe.heal == "adapters" and (recipe.kind == REMOVED or unshared):
        why = "--emulation none" if recipe.kind == REMOVED else "whole blocks go without emulation"
        raise RecipeError(f"--heal adapters has nothing to train ({why}); use --heal lora, or leave it out")
    if recipe.heal != "none" and recipe.fuse:
        raise RecipeError("--heal trains adapters and --fuse leaves none; give one of them")
    if recipe.heal == "none" and (recipe.heal_minutes or recipe.heal_steps):
        raise RecipeError("--heal-minutes and --heal-steps need --heal adapters, lora or prune-aware")
    if recipe.heal == "prune-aware":
        _refuse_with_gates(recipe)


def _refuse_with_gates(recipe: Recipe) -> None:
    """Refuse what gates of KV heads and of FFN units cannot be trained for."""
    flag = "--heal prune-aware"
    if narrows(recipe.kind):
        return
    if not limits(recipe):
        what = "which KV heads stay full (--kv-budget) or which FFN units stay (--emulation narrow)"
        raise RecipeError(f"{flag} trains {what}, and this asks for {recipe.kind}; use --heal lora")
    if recipe.search == "exchange":
        raise RecipeError(f"{flag} and --search exchange both change the choice of heads; give one of them")
    if not by_head(recipe):
        how = "--importance aumann-shapley, --search rank, and a KV budget or a loss; not --task, --window-by layer"
        raise RecipeError(f"{flag} needs windows that are chosen with {how}")


def _refuse_with_narrower_ffns(recipe: Recipe, amounts: list[str]) -> None:
    """Refuse what contradicts FFNs whose widths a weight budget says."""
    flag, budget = f"--emulation {recipe.kind}", "--weight-budget"
    if others := [each for each in amounts if each != budget]:
        raise RecipeError(f"{flag}: {budget} alone says how narrow FFNs get; leave {others[0]} out")
    if not amounts:
        raise RecipeError(f"{flag} needs {budget}, such as 90%: it says how narrow FFNs get")
    for other, given in {"--fuse": recipe.fuse, "--recovery-aware": recipe.recovery_aware}.items():
        if given:
            raise RecipeError(f"{flag} makes ordinary weights, judged as they are; leave {other} out (--effort quick)")
    for other, asked in {"--task": recipe.task, "--copying": recipe.copying}.items():
        if asked:
            raise RecipeError(f"{flag} chooses by gradients on calibration text; leave {other} out")
    if recipe.search != "rank":
        raise RecipeError(f"{flag} has a search of its own; leave --search {recipe.search} out (--effort quick)")


def _refuse_with_skipped_ffns(recipe: Recipe, amounts: list[str]) -> None:
    """Refuse what contradicts FFNs that tokens skip."""
    if recipe.ffn_skip is None:
        raise RecipeError(f"--emulation {recipe.kind} needs --ffn-skip, such as 25%: it says how many FFN runs go")
    if not skips(recipe.kind) and not limits(recipe):
        raise RecipeError(f"--ffn-skip goes alone or beside windows, and this asks for {recipe.kind}; leave it out")
    beside = ("--kv-budget", "--target-tokens") if limits(recipe) else ()
    if others := [each for each in amounts if each not in beside]:
        raise RecipeError(f"--ffn-skip goes alone, or with --kv-budget beside windows; leave {others[0]} out")
    flags = {
        "--compensate": recipe.compensate, "--recalibrate": recipe.recalibrate, "--fuse": recipe.fuse,
        "--recovery-aware": recipe.recovery_aware, f"--heal {recipe.heal}": recipe.heal != "none",
        "--stream": recipe.stream, "--memory": recipe.memory,
    }  # fmt: skip
    if asked := [flag for flag, given in flags.items() if given]:
        raise RecipeError(f"--ffn-skip leaves all weights as they are and in memory; leave {asked[0]} out")


def most_skipped(recipe: Recipe, num_blocks: int) -> float:
    """Share of all FFN runs that can be spared: those of the first and the last block and of first tokens stay."""
    rows = recipe.row_tokens
    return (len(skippable(recipe, num_blocks)) / num_blocks) * max(0, rows - FIRST_TOKENS) / rows


def skippable(recipe: Recipe, num_blocks: int) -> list[int]:
    """Blocks whose FFNs may be skipped."""
    return [block for block in range(1, num_blocks - 1) if block not in recipe.keep]


def _refuse_with_whole_blocks(recipe: Recipe, kinds: set[str]) -> None:
    """Refuse what contradicts blocks that share the weights of kept ones."""
    flag = f"--emulation {recipe.kind}"
    if kinds != {"blocks"}:
        raise RecipeError(f"{flag} replaces whole blocks; ask for --blocks N and for nothing else")
    if recipe.compensate or recipe.fuse:
        flag = "--compensate" if recipe.compensate else "--fuse"
        raise RecipeError(f"{flag} changes kept weights, which {flag} uses twice; give one of them")
    if recipe.recovery_aware:
        raise RecipeError(f"--recovery-aware cannot try {flag} (who lends depends on who stays); leave it out")
    if recipe.format != "shoal":
        raise RecipeError(f"--format {recipe.format} holds no shared blocks; use --format shoal, or --emulation none")
