"""Windows, stage by stage: the text to choose on, the limit of every layer, what plans are judged by, what is measured.

A window is a share of the context, so plans are chosen on rows that are shorter than the context, with windows that are
shorter by the same factor.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.budget import held_out_rows
from pruning.console import Reporter, either
from pruning.errors import CalibrationError, RecipeError
from pruning.evaluation.long_context import score_plan
from pruning.forward.blocks import removed
from pruning.forward.evaluator import Evaluator
from pruning.forward.streams import describe
from pruning.models.loading import DenseModel
from pruning.models.modeling import blocks_of
from pruning.plan import Plan, Sublayer
from pruning.recipe import Recipe
from pruning.search import heads
from pruning.search.selection import Judge
from pruning.texts.calibration import from_files, last_windows, other_windows
from pruning.texts.long_context import KEYS, LongPrompt, code_prompts
from pruning.texts.reading import read_text
from pruning.texts.shipped import rows_held_out, rows_to_choose_on
from pruning.variants import cache_of
from pruning.variants.window import Window
from pruning.variants.window_fit import limits, resized
from pruning.workdir import Journal

SINK_ROWS = 2  # rows that decide which sink each layer has
CODE_PROMPTS = 2  # that plans are judged by
TOKENS_FOR_A_CODE = 96  # of a prompt, at least; eight codes at most
MEASURED_PROMPTS = 2  # dense and pruned, at the end
CODES_FOUND = 0.9  # of those that the dense model finds
EDGE_TOKENS = 32  # of a row that tell whether it reaches into held-out text


@dataclass(frozen=True, slots=True)
class Limits:
    """Every attention layer that may be limited, limited.

    Attributes:
        scored: With windows for the rows that plans are judged on.
        served: The same with windows for the context.
    """

    scored: Mapping[Sublayer, Window]
    served: Mapping[Sublayer, Window]

    def by(self, plan: heads.HeadPlan) -> "Limits":
        """The same by a plan: without layers of which all KV heads keep every token."""
        scored, served = (heads.limited(heads.sized(limits, plan), plan.full) for limits in (self.scored, self.served))
        return Limits(scored, served)

    def full_heads(self) -> dict[int, tuple[int, ...]]:
        """Block -> the KV heads of a limited layer that keep every token."""
        return {sublayer.block: window.full for sublayer, window in self.served.items() if window.full}

    def windows(self) -> dict[int, int]:
        """Block -> positions that its limited KV heads keep."""
        return {sublayer.block: window.size for sublayer, window in self.served.items()}


def listed(plan: Plan) -> str:
    """The sizes of a plan's windows, for people."""
    found = {
        plan.windows.get(each.block, plan.window) for each, kind in plan.removed.items() if cache_of(kind) == "window"
    }
    return either(sorted(found))


def texts(dense: DenseModel, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Rows to choose on, int64 [n, T], and rows as long as the context to judge the result by, int64 [m, L]."""
    assert recipe.context is not None
    length, tokens = recipe.row_tokens, recipe.fit_tokens
    rows, (held, context) = -(-tokens // length), held_out_rows(recipe)
    if recipe.calibration:
        found = from_files(recipe.calibration, dense.tokenizer, tokens, length, recipe.seed)
        return found, last_windows(recipe.calibration, dense.tokenizer, held, context)
    found = rows_to_choose_on(dense.tokenizer, length)
    if len(found) < rows:
        raise CalibrationError(
            f"the built-in text holds {found.numel()} tokens, not {tokens}; give --calibration files"
        )
    return found[:rows], rows_held_out(dense.tokenizer, context, held)


def limited(dense: DenseModel, recipe: Recipe, rows: Tensor, reporter: Reporter) -> Limits:
    """Limit every attention layer that sees all tokens, with the sink, or none, that suits it, as those before."""
    evaluator = Evaluator(dense.model, dense.family, rows[:SINK_ROWS], 1, residency=dense.residency)
    wanted = [Sublayer(block, "attention") for block in dense.limitable]
    assert recipe.window is not None
    size = _in_rows(recipe.window, recipe, rows.shape[1])
    new = {sublayer: each.window for sublayer, each in limits(evaluator, wanted, size, reporter).items()}
    scored = {each: resized(limit, _in_rows(limit.size, recipe, rows.shape[1])) for each, limit in dense.limits.items()}
    return Limits(
        scored | new, {**dense.limits, **{each: resized(limit, recipe.window) for each, limit in new.items()}}
    )


def _in_rows(size: int, recipe: Recipe, length: int) -> int:
    """Positions in rows of this length of a window that keeps so many of the context."""
    assert recipe.context is not None
    return max(2, size * length // recipe.context)


@contextmanager
def as_before(dense: DenseModel, recipe: Recipe, rows: Tensor) -> Iterator[None]:
    """Give the dense model of a checkpoint the limits of earlier runs inside the `with`, for rows of this length."""
    blocks = blocks_of(dense.model, dense.family)
    with ExitStack() as stack:
        for sublayer, window in dense.limits.items():
            limited = resized(window, _in_rows(window.size, recipe, rows.shape[1]))
            stack.enter_context(removed(blocks[sublayer.block], dense.family, sublayer.kind, limited))
        yield


def as_served(scored: Mapping[Sublayer, Any], found: Limits) -> dict[Sublayer, Any]:
    """Limits with windows for the context; what is no limit stays as it is."""
    served = found.served
    return {each: resized(made, served[each].size) if each in served else made for each, made in scored.items()}


def others(dense: DenseModel, recipe: Recipe, tokens: int, rows: Tensor, held_out: Tensor) -> Tensor:
    """Rows to heal on, int64 [n, T]: at most so many tokens, none of those chosen on or held out."""
    if recipe.calibration:
        found = other_windows(recipe.calibration, dense.tokenizer, tokens, rows.shape[1], rows)
    else:
        found = rows_to_choose_on(dense.tokenizer, rows.shape[1])[len(rows) :][: tokens // rows.shape[1]]
    known = held_out.numpy().tobytes()
    ends = (EDGE_TOKENS, -EDGE_TOKENS)
    apart = [not any((row[:end] if end > 0 else row[end:]).numpy().tobytes() in known for end in ends) for row in found]
    return found[torch.tensor(apart, dtype=torch.bool)]


def judges(
    dense: DenseModel, recipe: Recipe, rows: Tensor, found: Limits, journal: Journal, reporter: Reporter
) -> list[Judge]:
    """What plans are judged by: loss on text, and NLL of codes that were hidden far before they are asked for.

    Perplexity hardly sees what is fetched from far away. Each cost counts where it is positive: that a limit makes one
    of the two better is no reason to limit it.
    """
    settings: dict[str, Any] = {"journal": journal, "residency": dense.residency, "batch_size": 1}
    windows = dict(found.scored)

    def adapters(base: Sequence[Sublayer]) -> Mapping[Sublayer, Window]:
        return windows

    text = Evaluator(dense.model, dense.family, rows, **settings)
    made = [Judge("text", text, 1.0, adapters, "windows", gains=False)]
    prompts = _prompts(dense, recipe, rows.shape[1], CODE_PROMPTS, recipe.seed + 2, reporter) if recipe.codes else []
    if prompts:
        tokens = torch.stack([prompt.tokens for prompt in prompts])
        counted = torch.stack([prompt.counted for prompt in prompts])
        codes = Evaluator(dense.model, dense.family, tokens, counted=counted, **settings)
        made.append(Judge("far codes", codes, recipe.codes, adapters, "windows", gains=False))
    return made


def check_reach(judges: Sequence[Judge], found: Limits) -> None:
    """Refuse what windows change nothing of.

    Raises:
        RecipeError: All rows of a judge fit into the windows.
    """
    size = max(window.size for window in found.scored.values())
    for judge in judges:
        longest = max(rows.shape[1] for rows in judge.evaluator.batches)
        if longest <= size:
            raise RecipeError(
                f"{judge.name}: its rows of at most {longest} tokens fit into the windows of {size} tokens that plans "
                "are judged with; give a task of longer ones, a smaller --window, or --emulation low-rank"
            )


def _prompts(
    dense: DenseModel, recipe: Recipe, length: int, count: int, seed: int, reporter: Reporter
) -> list[LongPrompt]:
    """Prompts with hidden codes; none, and a note, where they are too short to hide any."""
    around = read_text(recipe.calibration[0], dense.tokenizer) if recipe.calibration else None
    keys = min(KEYS, max(1, length // TOKENS_FOR_A_CODE))
    try:
        return code_prompts(dense.tokenizer, around, length, count, seed, keys)
    except CalibrationError as error:
        reporter.say(f"note: no codes are hidden in rows of {length} tokens ({error})")
        return []


class Measured:
    """Figures of plans of one model, each measured once: the loss on held-out rows and the hidden codes found.

    Args:
        dense: The model, left as it is.
        recipe: Resolved.
        held_out: Rows as long as the context, int64 [m, L]; or shorter, with windows shorter by the same factor.
        journal: Losses already measured.
        reporter: For progress.
    """

    def __init__(
        self, dense: DenseModel, recipe: Recipe, held_out: Tensor, journal: Journal | None, reporter: Reporter
    ) -> None:
        self._evaluator = Evaluator(
            dense.model, dense.family, held_out, 1, journal=journal, residency=dense.residency
        )  # fmt: skip
        self._length = held_out.shape[1]
        self._dense, self._recipe, self._reporter = dense, recipe, reporter
        self._losses: dict[tuple[str, ...], float] = {}
        self._codes: dict[tuple[str, ...], dict[str, float] | None] = {}

    def loss(self, limits_of_plan: Mapping[Sublayer, Window]) -> float:
        """Nats/token; of the dense model where nothing is limited."""
        in_rows = self._in_rows(limits_of_plan)
        key = tuple(describe(in_rows))
        if key not in self._losses:
            self._losses[key] = float(self._evaluator.loss(in_rows).mean())
        return self._losses[key]

    def _in_rows(self, limits_of_plan: Mapping[Sublayer, Window]) -> Mapping[Sublayer, Window]:
        """Limits with windows for the rows that are measured on."""
        if self._length >= (self._recipe.context or 0):
            return limits_of_plan
        return {
            sublayer: resized(window, _in_rows(window.size, self._recipe, self._length))
            for sublayer, window in limits_of_plan.items()
        }

    def codes(self, limits_of_plan: Mapping[Sublayer, Window]) -> dict[str, float] | None:
        """As `found_codes`."""
        limits_of_plan = self._in_rows(limits_of_plan)
        key = tuple(describe(limits_of_plan))
        asked = ["codes", key, self._recipe.seed, self._evaluator.text]  # the text tells which files hide the codes
        if (known := self._evaluator.journal.recall(asked)) is not None:
            self._codes[key] = known
        if key not in self._codes:
            self._codes[key] = found_codes(self._dense, self._recipe, self._reporter, limits_of_plan)
            self._evaluator.journal.keep(asked, self._codes[key])
        return self._codes[key]

    def as_good(self, limits_of_plan: Mapping[Sublayer, Window], bound: float) -> bool:
        """Whether a plan loses at most `bound` nats/token, and finds nearly all codes that the dense model does."""
        increase = self.loss(limits_of_plan) - self.loss({})
        if increase > bound:
            self._reporter.say(f"  loss increase {increase:.4f} nats per token: too much")
            return False
        mine, theirs = self.codes(limits_of_plan), self.codes({})
        enough = mine is None or theirs is None or mine["found"] >= CODES_FOUND * theirs["found"]
        found = "" if mine is None or theirs is None else f", codes found {mine['found']} (dense {theirs['found']})"
        self._reporter.say(f"  loss increase {increase:.4f} nats per token{found}" + ("" if enough else ": too few"))
        return enough


@torch.inference_mode()
def found_codes(
    dense: DenseModel, recipe: Recipe, reporter: Reporter, limits_of_plan: Mapping[Sublayer, Window] | None = None
) -> dict[str, float] | None:
    """How many hidden codes the model finds, of how many, and their NLL in nats/token; None: none hidden.

    Prompts are half as long as the rows that are measured on, so that what is asked for lies outside of every window.

    Args:
        dense: The model, dense or cut.
        recipe: Resolved.
        reporter: For progress.
        limits_of_plan: What takes the place of attention sublayers.
    """
    length = held_out_rows(recipe)[1] // 2
    prompts = _prompts(dense, recipe, length, MEASURED_PROMPTS, recipe.seed + 3, reporter)
    if not prompts:
        return None
    with reporter.progress("hidden codes", len(prompts)) as step:
        tokens = torch.stack([prompt.tokens for prompt in prompts])
        evaluator = Evaluator(dense.model, dense.family, tokens, 1, residency=dense.residency)
        scores = score_plan(evaluator, prompts, limits_of_plan or {}, step.advance)
    return {
        "length": length,
        "found": sum(sum(each.found) for each in scores),
        "asked": sum(len(each.found) for each in scores),
        "nll": sum(each.nll for each in scores) / len(scores),
    }
