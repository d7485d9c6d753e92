"""The recipe: every flag is a key, every key a flag."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pruning.help import FIRST
from pruning.plan import EmulationKind
from pruning.variants import REMOVED, row, state_of

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
        Share,
        FIRST,
        Field(description="How much: KV cache of a request to keep, 30% by default."),
    ] = None
    weight_budget: Annotated[
        Share,
        FIRST,
        Field(description="Or: weight bytes to keep, such as 90%: removes sublayers of both kinds, or narrows FFNs."),
    ] = None
    ffn_skip: Annotated[
        Share,
        SELECTION,
        Field(
            description="FFN runs that tokens skip, such as 25%: those predicted to change least. Alone, or beside "
            "windows with --kv-budget."
        ),
    ] = None
    max_loss_increase: Annotated[
        float | None,
        FIRST,
        Field(gt=0, description="Or: nats per token on held-out text; as much attention goes as stays inside."),
    ] = None
    target_tokens: Annotated[
        int | None,
        FIRST,
        Field(ge=1, description="Or: tokens that the KV cache shall hold, in requests of --context tokens."),
    ] = None
    kv_memory: Annotated[str | None, FIRST, Field(description="Memory of that cache: 16GiB, 500MB.")] = None
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
        FIRST,
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
        FIRST,
        Field(ge=2, description="For what: tokens of a request; the model's own, at most 8192, by default."),
    ] = None
    window: Annotated[
        int | None,
        SELECTION,
        Field(ge=2, description="Tokens that a limited layer keeps; an eighth of --context by default."),
    ] = None
    window_sizes: Annotated[
        Literal["auto", "one", "several"] | None,
        SELECTION,
        Field(
            description="Windows of one size, or also half and twice as long, by layer. auto, the default without "
            "--window: several under 30% of the cache, and where windows are under 1,024 tokens."
        ),
    ] = None
    window_by: Annotated[
        Literal["auto", "layer", "head"],
        SELECTION,
        Field(description="Limit whole layers, single KV heads, or what costs less of the two."),
    ] = "auto"
    tensor_parallel: Annotated[
        int,
        SELECTION,
        Field(ge=1, description="For windows by KV head: ranks that shall serve it; each gets as many full heads."),
    ] = 1
    codes: Annotated[
        float,
        SELECTION,
        Field(
            ge=0,
            description="For windows: weight of codes hidden far away, beside 1 for text; each loss counts as a share "
            "of what limiting everything loses.",
        ),
    ] = 1.5
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
        Field(
            ge=1,
            description="Adapter rank r; of kv-share, its map of the own input; of shared, each difference; of "
            "--ffn-skip, what tokens get that skip an FFN.",
        ),
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
        Literal["none", "adapters", "lora", "prune-aware"],
        HEALING,
        Field(
            description="Train the adapters, or also low-rank changes of kept weights, merged before export (slow). "
            "prune-aware: training also decides which KV heads stay full, or which FFN units stay."
        ),
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
        FIRST,
        SEVERAL,
        Field(
            description="Files of text (.txt, .jsonl, .parquet, also .gz, .zst), chats too, or data sets of the hub "
            "(owner/name:split). Default: text of this package for windows, else text the model writes itself."
        ),
    ] = []
    calibration_tokens: Annotated[
        int | None,
        CALIBRATION,
        Field(
            ge=1,
            description="Tokens to fit on: 16384 for adapters, 65536 for narrower FFNs, 8192 for --ffn-skip, 6144 for "
            "windows.",
        ),
    ] = None
    score_tokens: Annotated[
        int, CALIBRATION, Field(ge=1, description="Tokens (of the same) that importance is measured on.")
    ] = 4096
    sequence_length: Annotated[
        int | None,
        CALIBRATION,
        Field(ge=8, description="Tokens in one calibration row: 256, or 1024 (the context, if less) for windows."),
    ] = None
    held_out_tokens: Annotated[
        int | None,
        CALIBRATION,
        Field(
            ge=64,
            description="For windows: tokens the result is measured on, 8192 (a context, if more); with fewer than a "
            "context, windows are measured shorter by the same factor.",
        ),
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
        bool,
        OUTPUT,
        Field(description="Read the blocks from disk one at a time; see --memory."),
    ] = False
    memory: Annotated[
        str | None,
        OUTPUT,
        Field(description="What the run may take, such as 20GiB: it streams where the model does not fit as a whole."),
    ] = None
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
        others = others or self.recovery_aware or self.copying > 0 or self.compensate or self.fuse or bool(self.task)
        alone = self.ffn_skip is not None and self.kv_budget is None and self.target_tokens is None
        return self.emulation or ("low-rank" if others else "skip" if alone else "window")

    @property
    def metric(self) -> str:
        """The importance metric."""
        blind = self.task or self.copying  # of which gradients of all tokens' losses know nothing
        return self.importance or ("aumann-shapley" if limits(self) and not blind else "leave-one-out")

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


SHORT_ROW_TOKENS, FIT_TOKENS = 256, 16384  # for adapters
KV_BUDGET = "30%"  # kept where nothing says how much


def limits(recipe: Recipe) -> bool:
    """Whether attention is limited to windows, not removed."""
    return state_of(recipe.kind) == "limited"


def recalibrates(recipe: Recipe) -> bool:
    """Whether the final norm is scaled in the end."""
    return recipe.compensate or recipe.fuse if recipe.recalibrate is None else recipe.recalibrate


def by_head(recipe: Recipe) -> bool:
    """Whether windows are chosen by KV head, by gates; else by whole layers, by any metric and search."""
    counted = recipe.attention is not None or recipe.weight_budget is not None
    usual = recipe.metric == "aumann-shapley" and recipe.search in ("rank", "exchange") and not recipe.task
    return limits(recipe) and recipe.window_by != "layer" and usual and not counted


def emulation_kind(recipe: Recipe) -> EmulationKind:
    """The recipe's emulation as the plan names it."""
    return recipe.kind.replace("-", "_")
