"""Windows, stage by stage: the text to choose on, the limit of every layer, what plans are judged by, what is measured.

A window is a share of the context, so plans are chosen on rows that are shorter than the context, with windows that are
shorter by the same factor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.errors import CalibrationError, RecipeError
from pruning.evaluation.long_context import score
from pruning.forward.blocks import Residency
from pruning.forward.evaluator import Evaluator
from pruning.importance import Scores
from pruning.models.loading import DenseModel
from pruning.plan import Sublayer, Unit, layers_within, parse_share
from pruning.recipe import KV_BUDGET, Recipe
from pruning.search import heads
from pruning.search.selection import Judge, Selection
from pruning.texts.calibration import from_files, last_windows, other_windows, standard_library_ids
from pruning.texts.long_context import KEYS, LongPrompt, code_prompts
from pruning.texts.reading import read_text
from pruning.variants.window import Window
from pruning.variants.window_fit import limits, resized
from pruning.workdir import Journal

SINK_ROWS = 2  # rows that decide which sink each layer has
CODE_PROMPTS = 2  # that plans are judged by
TOKENS_FOR_A_CODE = 96  # of a prompt, at least; eight codes at most
MEASURED_PROMPTS = 2  # dense and pruned, at the end
HELD_OUT_TOKENS = 8192
WHOLE_LAYERS_MAY_LOSE = 1.1  # of what single heads lose
BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried where a loss is allowed
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

    def but_for(self, full: heads.Full) -> "Limits":
        """The same where some KV heads keep every token; without layers of which all do."""
        return Limits(heads.limited(self.scored, full), heads.limited(self.served, full))

    def full_heads(self) -> dict[int, tuple[int, ...]]:
        """Block -> the KV heads of a limited layer that keep every token."""
        return {sublayer.block: window.full for sublayer, window in self.served.items() if window.full}


def texts(dense: DenseModel, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Rows to choose on, int64 [n, T], and rows as long as the context to judge the result by, int64 [m, L]."""
    assert recipe.context is not None
    length, context, tokens = recipe.row_tokens, recipe.context, recipe.fit_tokens
    rows, held = -(-tokens // length), max(1, HELD_OUT_TOKENS // context)
    if recipe.calibration:
        found = from_files(recipe.calibration, dense.tokenizer, tokens, length, recipe.seed)
        return found, last_windows(recipe.calibration, dense.tokenizer, held, context)
    ids = standard_library_ids(dense.tokenizer)
    needed = rows * length + held * context
    if len(ids) < needed:
        raise CalibrationError(f"the built-in text holds {len(ids)} tokens, not {needed}; give --calibration files")
    return ids[: rows * length].view(rows, length), ids[-held * context :].view(held, context)


def limited(dense: DenseModel, recipe: Recipe, rows: Tensor, reporter: Reporter) -> Limits:
    """Limit every attention layer that sees all tokens, with the sink, or none, that suits it."""
    assert recipe.window is not None
    assert recipe.context is not None
    evaluator = Evaluator(dense.model, dense.family, rows[:SINK_ROWS], batch_size=1)
    wanted = [Sublayer(block, "attention") for block in dense.limitable]
    size = max(2, recipe.window * rows.shape[1] // recipe.context)
    found = {sublayer: each.window for sublayer, each in limits(evaluator, wanted, size, reporter).items()}
    return Limits(found, as_served(found, recipe))


def as_served(scored: Mapping[Sublayer, Any], recipe: Recipe) -> dict[Sublayer, Any]:
    """Limits with windows for the context."""
    assert recipe.window is not None
    return {sublayer: resized(window, recipe.window) for sublayer, window in scored.items()}


def others(dense: DenseModel, recipe: Recipe, tokens: int, rows: Tensor, held_out: Tensor) -> Tensor:
    """Rows to heal on, int64 [n, T]: at most so many tokens, none of those chosen on or held out."""
    if recipe.calibration:
        found = other_windows(recipe.calibration, dense.tokenizer, tokens, rows.shape[1], rows)
    else:
        ids = standard_library_ids(dense.tokenizer)[rows.numel() :]
        count = min(tokens, len(ids)) // rows.shape[1]
        found = ids[: count * rows.shape[1]].view(count, -1)
    known = held_out.numpy().tobytes()
    ends = (EDGE_TOKENS, -EDGE_TOKENS)
    apart = [not any((row[:end] if end > 0 else row[end:]).numpy().tobytes() in known for end in ends) for row in found]
    return found[torch.tensor(apart, dtype=torch.bool)]


def judges(
    dense: DenseModel, recipe: Recipe, rows: Tensor, found: Limits, journal: Journal, reporter: Reporter,
    residency: Residency | None = None,
) -> list[Judge]:  # fmt: skip
    """What plans are judged by: loss on text, and NLL of codes that were hidden far before they are asked for.

    Perplexity hardly sees what is fetched from far away. Each cost counts where it is positive: that a limit makes one
    of the two better is no reason to limit it.
    """
    settings: dict[str, Any] = {"journal": journal, "residency": residency, "batch_size": 1}
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


def by_head(recipe: Recipe) -> bool:
    """Whether KV heads are chosen, by their gates; else whole layers are, by any metric and search."""
    counted = recipe.attention is not None or recipe.weight_budget is not None
    usual = recipe.metric == "aumann-shapley" and recipe.search in ("rank", "exchange") and not recipe.task
    return recipe.window_by != "layer" and usual and not counted


@dataclass(frozen=True, slots=True)
class Choice:
    """Scores of all KV heads, from which a plan for any budget follows.

    Attributes:
        scores: What limiting each head costs.
        limits: Every layer that may be limited, limited.
        free: Blocks whose heads may be limited.
        kept: Heads of layers that stay as they are.
        left: Share of its cache that a limited head keeps.
        by: "head", or "auto": whole layers where they cost little more.
    """

    scores: heads.HeadScores
    limits: Limits
    free: Sequence[int]
    kept: heads.Full
    left: float
    by: str

    @classmethod
    def of(
        cls, dense: DenseModel, recipe: Recipe, judges: Sequence[Judge], found: Limits, reporter: Reporter
    ) -> "Choice":
        """Score all heads."""
        assert recipe.window is not None
        assert recipe.context is not None
        scores = heads.score(judges, found.scored, recipe.draws, reporter)
        free = [block for block in dense.limitable if block not in recipe.keep]
        whole = [block for block in dense.limitable if block in recipe.keep]
        kept = frozenset((block, head) for block in whole for head in range(scores.heads.shape[1]))
        return cls(scores, found, free, kept, recipe.window / recipe.context, recipe.window_by)

    @property
    def total(self) -> int:
        """KV heads of all layers that may be limited or stay."""
        return len(self.kept) + len(self.free) * self.scores.heads.shape[1]

    def plan(self, budget: float) -> heads.Full:
        """The heads that keep every token within a share of the KV cache: single ones, or those of whole layers.

        Every head more that is split off costs time, so whole layers are taken where by first order they lose little.
        """
        full = self.total - layers_within(budget, self.total, self.left) - len(self.kept)
        single = self.kept | heads.best_heads(self.scores, self.free, full)
        if self.by == "head":
            return single
        layers = self.kept | heads.best_layers(self.scores, self.free, full // self.scores.heads.shape[1])
        return layers if self.predicted(layers) <= WHOLE_LAYERS_MAY_LOSE * self.predicted(single) else single

    def predicted(self, plan: heads.Full) -> float:
        """What a plan costs by first order, nats/token."""
        rest = [(block, head) for block in self.free for head in range(self.scores.heads.shape[1])]
        return sum(float(self.scores.heads[each]) for each in rest if each not in plan)

    def first_order(self, plan: heads.Full) -> float:
        """What a plan costs on the text alone by first order, nats/token."""
        text = next(iter(self.scores.by_judge.values())).clamp_min(0)
        rest = [(block, head) for block in self.free for head in range(text.shape[1])]
        return sum(float(text[each]) for each in rest if each not in plan)

    def share(self, plan: heads.Full) -> float:
        """Share of the KV cache that a plan keeps."""
        return (len(plan) + (self.total - len(plan)) * self.left) / self.total

    def selection(self, plan: heads.Full) -> tuple[Selection, Limits]:
        """The limited layers, least first, with the scores of all; and their limits."""
        limits = self.limits.but_for(plan)
        layers = {Unit(block, "attention"): float(self.scores.layers[block]) for block in self.free}
        chosen = [unit for unit in layers if unit.sublayers[0] in limits.served]
        return Selection(sorted(chosen, key=lambda unit: layers[unit]), {"": Scores(layers)}), limits


def choose(
    dense: DenseModel, recipe: Recipe, judges: Sequence[Judge], found: Limits, held_out: Tensor, reporter: Reporter
) -> tuple[Selection, Limits]:
    """Which KV heads keep every token, within the budget, or within the loss that is allowed.

    Returns:
        The limited layers and the scores of all, and the limits of the plan.

    Raises:
        RecipeError: No plan stays within the loss.
    """
    choice = Choice.of(dense, recipe, judges, found, reporter)
    if recipe.max_loss_increase is not None:
        plan = smallest(dense, recipe, choice, recipe.max_loss_increase, held_out, reporter)
    else:
        plan = choice.plan(parse_share(recipe.kv_budget or KV_BUDGET, "kv-budget"))
    if recipe.search == "exchange":
        plan = heads.exchange(heads.Trial(judges, found.scored, reporter), plan, choice.scores, choice.free)
    return choice.selection(plan)


def smallest(
    dense: DenseModel, recipe: Recipe, choice: Choice, bound: float, held_out: Tensor, reporter: Reporter
) -> heads.Full:
    """The plan with the smallest KV cache that stays within a loss on held-out rows of the context, by bisection.

    Raises:
        RecipeError: No plan does.
    """
    evaluator = Evaluator(dense.model, dense.family, held_out, 1)
    before = float(evaluator.loss({}).mean())
    shares = [share for share in BUDGETS if share >= choice.left + 1e-9]
    fails, fits = -1, len(shares)
    while fits - fails > 1:
        middle = (fits + fails) // 2
        served = choice.limits.but_for(choice.plan(shares[middle])).served
        increase = float(evaluator.loss(served).mean()) - before
        reporter.say(f"{shares[middle]:.0%} of the KV cache: loss increase {increase:.4f} nats per token")
        fails, fits = (fails, middle) if increase <= bound else (middle, fits)
    if fits == len(shares):
        raise RecipeError(f"--max-loss-increase {bound} is out of reach: {shares[-1]:.0%} of the KV cache costs more")
    return choice.plan(shares[fits])


def _prompts(
    dense: DenseModel, recipe: Recipe, length: int, count: int, seed: int, reporter: Reporter
) -> list[LongPrompt]:
    """Prompts with hidden codes; none, and a note, where they are too short to hide any."""
    around = read_text(recipe.calibration[0]) if recipe.calibration else None
    keys = min(KEYS, max(1, length // TOKENS_FOR_A_CODE))
    try:
        return code_prompts(dense.tokenizer, around, length, count, seed, keys)
    except CalibrationError as error:
        reporter.say(f"note: no codes are hidden in rows of {length} tokens ({error})")
        return []


@torch.inference_mode()
def found_codes(dense: DenseModel, recipe: Recipe, reporter: Reporter) -> dict[str, float] | None:
    """How many hidden codes the model in memory finds, of how many, and their NLL in nats/token; None: none hidden.

    Prompts are half as long as the context, so that what is asked for lies outside of every window.
    """
    assert recipe.context is not None
    length = recipe.context // 2
    prompts = _prompts(dense, recipe, length, MEASURED_PROMPTS, recipe.seed + 3, reporter)
    if not prompts:
        return None
    with reporter.progress("hidden codes", len(prompts)) as step:
        scores = score(dense.model, prompts, step.advance)
    return {
        "length": length,
        "found": sum(sum(each.found) for each in scores),
        "asked": sum(len(each.found) for each in scores),
        "nll": sum(each.nll for each in scores) / len(scores),
    }
