"""The recipe: every flag is a key, every key a flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pruning.errors import RecipeError
from pruning.plan import layers_within, parse_amount, parse_share
from pruning.variants import REMOVED, cache_of, row

SELECTION = Parameter(group="Selection")
RECOVERY = Parameter(group="Recovery")
HEALING = Parameter(group="Healing")
CALIBRATION = Parameter(group="Calibration")
OUTPUT = Parameter(group="Output")
SEVERAL = Parameter(consume_multiple=True)

Amount = str | int | None
Share = str | None
Search = Literal["rank", "greedy", "exchange", "evolutionary", "policy-gradient", "consecutive"]


def _known(name: str) -> str:
    if name != REMOVED:
        row(name)
    return name


Emulation = Annotated[str, AfterValidator(_known)]
"""A kind of `pruning.variants` as typed (`low-rank`), or "none"."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _numbers(given: object) -> object:
    """Numbers of a list as they may come from a command line: 0,1 or 0 1."""
    if not isinstance(given, list | tuple):
        given = [given]
    return [part for each in given for part in (each.split(",") if isinstance(each, str) else [each])]


class Recipe(BaseModel):
    """What to remove and how to recover it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Annotated[
        Amount,
        SELECTION,
        Field(description="Attention sublayers to remove: a count (10) or a share (33%, the default)."),
    ] = None
    ffn: Annotated[Amount, SELECTION, Field(description="FFN sublayers to remove: a count or a share.")] = None
    blocks: Annotated[Amount, SELECTION, Field(description="Whole blocks to remove: a count or a share.")] = None
    sublayers: Annotated[
        Amount, SELECTION, Field(description="Sublayers of both kinds in one ranking: a count or a share.")
    ] = None
    kv_budget: Annotated[
        Share, SELECTION, Field(description="KV cache to keep, such as 66%: removes attention until it fits.")
    ] = None
    weight_budget: Annotated[
        Share, SELECTION, Field(description="Weight bytes to keep, such as 90%: removes sublayers of both kinds.")
    ] = None
    max_loss_increase: Annotated[
        float | None,
        SELECTION,
        Field(gt=0, description="Nats per token on held-out text: removes as much attention as stays inside."),
    ] = None
    importance: Annotated[
        str | None,
        SELECTION,
        Field(
            description="Importance metric; see `prune-export list`. aumann-shapley for windows, else leave-one-out."
        ),
    ] = None
    samples: Annotated[
        int | None,
        SELECTION,
        Field(ge=1, description="Subnetworks or orders drawn by metrics that sample: 8, or 1 for windows."),
    ] = None
    search: Annotated[Search, SELECTION, Field(description="How the plan is chosen.")] = "rank"
    recovery_aware: Annotated[
        bool,
        SELECTION,
        Field(description="Judge plans with their emulation in place, each on text it was not fitted on."),
    ] = False
    objective: Annotated[
        Literal["kl", "loss"], SELECTION, Field(description="What evolutionary and policy-gradient minimise.")
    ] = "kl"
    task: Annotated[
        list[str],
        SELECTION,
        SEVERAL,
        Field(description="FILE or FILE:weight to judge on instead of calibration text: text or questions (JSONL)."),
    ] = []
    copying: Annotated[
        float,
        SELECTION,
        Field(
            ge=0,
            description="Weight of windows whose second half repeats the first, beside 1 for the text: spares the "
            "layers that copy from the context.",
        ),
    ] = 0.0
    judged_by: Annotated[
        Literal["loss", "error"], SELECTION, Field(description="What counts in multiple-choice questions.")
    ] = "loss"
    generations: Annotated[
        int, SELECTION, Field(ge=1, description="Generations of evolutionary, steps of policy-gradient.")
    ] = 20
    offspring: Annotated[int, SELECTION, Field(ge=2, description="Plans in each of them.")] = 16
    context: Annotated[
        int | None,
        SELECTION,
        Field(ge=2, description="Tokens of a request that budgets count; the model's own, at most 8192, by default."),
    ] = None
    window: Annotated[
        int | None,
        SELECTION,
        Field(ge=2, description="Tokens that a limited layer keeps; an eighth of --context by default."),
    ] = None
    codes: Annotated[
        float,
        SELECTION,
        Field(ge=0, description="For windows: weight of codes hidden far away, beside 1 for the loss on text."),
    ] = 0.25
    keep: Annotated[
        list[int],
        BeforeValidator(_numbers),
        SELECTION,
        SEVERAL,
        Field(description="Blocks to leave alone: 0,1 or 0 1."),
    ] = []
    emulation: Annotated[
        Emulation | None,
        RECOVERY,
        Field(
            description="What a sublayer becomes: none (removed), or a kind of `prune-export list`. By default window "
            "for attention; low-rank for FFNs and blocks, and beside flags that concern adapters."
        ),
    ] = None
    rank: Annotated[
        int,
        RECOVERY,
        Field(ge=1, description="Adapter rank r; of kv-share, its map of the own input; of shared, each difference."),
    ] = 64
    sources: Annotated[
        int, RECOVERY, Field(ge=1, description="Kept attention layers whose output a context adapter reads.")
    ] = 1
    compensate: Annotated[
        bool, RECOVERY, Field(description="Refit the output projections of kept layers for what was removed (slow).")
    ] = False
    recalibrate: Annotated[
        bool | None,
        RECOVERY,
        Field(
            description="Scale the final norm so that the model is as sure as the dense one; by default with "
            "--compensate and --fuse, which gain by it."
        ),
    ] = None
    fit_precision: Annotated[
        Literal["auto", "bfloat16"],
        RECOVERY,
        Field(
            description="Arithmetic of the forward passes of choice and fit; auto: the dtype of the model. bfloat16 "
            "keeps the residual stream as it is, and is several times faster on CPUs that multiply it."
        ),
    ] = "auto"
    fuse: Annotated[
        bool, RECOVERY, Field(description="Write the emulation into ordinary weights: no extra operation when served.")
    ] = False
    heal: Annotated[
        Literal["none", "adapters", "lora"],
        HEALING,
        Field(description="Train the adapters, or also low-rank changes of kept weights, merged before export (slow)."),
    ] = "none"
    heal_loss: Annotated[
        Literal["kl", "next-token", "hidden"],
        HEALING,
        Field(description="kl and hidden learn from the dense model: its distribution, its states."),
    ] = "kl"
    heal_optimizer: Annotated[
        Literal["adamw", "spam"], HEALING, Field(description="spam clips gradient spikes and resets its momentum.")
    ] = "adamw"
    heal_minutes: Annotated[
        float | None, HEALING, Field(gt=0, description="Time to train; 30 where no steps are given either.")
    ] = None
    heal_steps: Annotated[
        int | None, HEALING, Field(ge=1, description="Updates to make; the result then does not depend on speed.")
    ] = None
    heal_learning_rate: Annotated[float, HEALING, Field(gt=0, description="Peak learning rate.")] = 1e-3
    heal_lora_rank: Annotated[int, HEALING, Field(ge=1, description="Rank of the changes of kept weights.")] = 32
    heal_batch_tokens: Annotated[int, HEALING, Field(ge=1, description="Tokens in one update.")] = 1024
    heal_precision: Annotated[
        Literal["auto", "bfloat16"],
        HEALING,
        Field(description="Arithmetic while training; auto: the dtype of the model. Trained weights are float32."),
    ] = "auto"
    calibration: Annotated[
        list[Path],
        CALIBRATION,
        SEVERAL,
        Field(description="Text or JSONL files. Default: text the model writes itself."),
    ] = []
    calibration_tokens: Annotated[
        int | None,
        CALIBRATION,
        Field(ge=1, description="Tokens the adapters are fitted on, 16384 by default; windows are chosen on 3072."),
    ] = None
    score_tokens: Annotated[
        int, CALIBRATION, Field(ge=1, description="Tokens (of the same) that importance is measured on.")
    ] = 4096
    sequence_length: Annotated[
        int | None,
        CALIBRATION,
        Field(ge=8, description="Tokens in one calibration row: 256, or 1024 (the context, if less) for windows."),
    ] = None
    seed: Annotated[int, CALIBRATION, Field(description="Seed of everything drawn.")] = 0
    dtype: Annotated[
        Dtype,
        OUTPUT,
        Field(
            description="Dtype to compute and store in; auto: float32 on CPU, else the model's own, which weights that "
            "do not change are stored in anyway."
        ),
    ] = "auto"
    stream: Annotated[
        bool, OUTPUT, Field(description="Score with the blocks read from disk one at a time (`score` only).")
    ] = False
    device: Annotated[str, OUTPUT, Field(description="cpu, cuda, cuda:1 or auto.")] = "auto"
    format: Annotated[
        Literal["shoal", "plan", "nemotron-nas", "gguf", "llama"],
        OUTPUT,
        Field(description="Who can read the checkpoint; see `prune-export list`."),
    ] = "shoal"

    @property
    def kind(self) -> str:
        """What sublayers become."""
        others = self.ffn is not None or self.blocks is not None or self.sublayers is not None
        others = others or self.weight_budget is not None or self.format in ("nemotron-nas", "gguf")
        others = others or self.recovery_aware or self.copying > 0 or self.compensate or self.fuse
        return self.emulation or ("low-rank" if others else "window")

    @property
    def metric(self) -> str:
        """The importance metric."""
        return self.importance or ("aumann-shapley" if limits(self) else "leave-one-out")

    @property
    def draws(self) -> int:
        """What metrics that sample draw."""
        return self.samples or (1 if limits(self) else 8)

    @property
    def row_tokens(self) -> int:
        """Tokens in one calibration row."""
        return self.sequence_length or SHORT_ROW_TOKENS

    @property
    def fit_tokens(self) -> int:
        """Tokens of all calibration rows."""
        return self.calibration_tokens or FIT_TOKENS


@dataclass(frozen=True, slots=True)
class Counts:
    """How many sublayers of each kind, of either kind, and whole blocks, to remove."""

    attention: int = 0
    ffn: int = 0
    blocks: int = 0
    sublayers: int = 0


SHORT_ROW_TOKENS, FIT_TOKENS = 256, 16384  # for adapters
LONG_ROW_TOKENS, CHOICE_TOKENS = 1024, 3072  # for windows: as large a share of a row as of the context
LONGEST_CONTEXT = 8192  # that a budget counts where nothing else is asked for
KV_BUDGET = "30%"  # kept where nothing says how much
WINDOW_SHARE = 8  # the context is so many windows long where nothing else is asked for


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
    window = recipe.window or max(2, context // WINDOW_SHARE) if limits(recipe) else None
    if window is not None and window >= context:
        raise RecipeError(f"--window {window} is no shorter than the context of {context} tokens: nothing is saved")
    length = recipe.sequence_length or (SHORT_ROW_TOKENS if window is None else min(context, LONG_ROW_TOKENS))
    tokens = recipe.calibration_tokens or (FIT_TOKENS if window is None else max(length, CHOICE_TOKENS))
    named = {"context": context, "window": window, "sequence_length": length, "calibration_tokens": tokens}
    return recipe.model_copy(
        update={**named, "emulation": recipe.kind, "importance": recipe.metric, "samples": recipe.draws}
    )


def limits(recipe: Recipe) -> bool:
    """Whether attention is limited to windows, not removed."""
    return cache_of(recipe.kind) == "window"


def counts(recipe: Recipe, num_blocks: int, sliding: int = 0) -> Counts:
    """Resolve the recipe's amounts against a model; a budget in loss or weights is an upper bound here.

    Args:
        recipe: Resolved.
        num_blocks: L.
        sliding: Attention layers that have a window by design; a share of the KV cache is one of the others'.

    Raises:
        RecipeError: An amount is malformed, out of range, contradicts another, or leaves no attention layer.
    """
    given = {
        "attention": recipe.attention, "ffn": recipe.ffn, "blocks": recipe.blocks, "sublayers": recipe.sublayers
    }  # fmt: skip
    amounts = {kind: amount for kind, amount in given.items() if amount is not None}
    free = num_blocks - len(set(recipe.keep))
    _refuse_contradictions(recipe, amounts, num_blocks)
    if recipe.kv_budget is not None:
        amounts["attention"] = _limited_within(recipe, num_blocks - sliding)
    elif recipe.max_loss_increase is not None:
        amounts["attention"] = min(free, num_blocks - 1)
    elif recipe.weight_budget is not None:
        parse_share(recipe.weight_budget, "weight-budget")
        amounts["sublayers"] = min(2 * free, 2 * num_blocks - 2)
    elif not amounts and limits(recipe):
        amounts["attention"] = _limited_within(recipe.model_copy(update={"kv_budget": KV_BUDGET}), num_blocks - sliding)
    elif not amounts:
        amounts["attention"] = "33%"
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


def _limited_within(recipe: Recipe, num_blocks: int) -> int:
    """Attention layers that have to be limited or removed for the recipe's share of the KV cache."""
    assert recipe.kv_budget is not None
    left = (recipe.window or 0) / (recipe.context or LONGEST_CONTEXT)
    count = layers_within(parse_share(recipe.kv_budget, "kv-budget"), num_blocks, left)
    if count > num_blocks:
        raise RecipeError(
            f"--kv-budget {recipe.kv_budget}: with every layer limited to {recipe.window} of {recipe.context} tokens, "
            f"{left:.1%} stays; give a smaller --window"
        )
    return count


def _refuse_contradictions(recipe: Recipe, amounts: dict[str, str | int], num_blocks: int) -> None:
    budgets = {
        "--kv-budget": recipe.kv_budget,
        "--weight-budget": recipe.weight_budget,
        "--max-loss-increase": recipe.max_loss_increase,
    }
    named = [flag for flag, value in budgets.items() if value is not None]
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
        and set(amounts) != {"blocks"}
    ):
        raise RecipeError(f"--format {recipe.format} holds no adapters; add --fuse, or choose --emulation none")
    if recipe.fuse and recipe.max_loss_increase is not None:
        raise RecipeError("--max-loss-increase measures adapters, which --fuse refits; leave one of them out")
    if named and named != ["--kv-budget"] and recipe.search not in ("rank", "greedy"):
        raise RecipeError(f"{named[0]} needs an order of removal: --search rank or greedy, not {recipe.search}")
    outside = [block for block in recipe.keep if not 0 <= block < num_blocks]
    if outside:
        raise RecipeError(f"--keep {outside[0]}: blocks are 0 to {num_blocks - 1}")
    if recipe.search == "consecutive" and (set(amounts) != {"blocks"} or recipe.keep):
        raise RecipeError("--search consecutive removes a run of whole blocks: ask for --blocks N, without --keep")
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
        raise RecipeError("--heal-minutes and --heal-steps need --heal adapters or --heal lora")


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
