"""How long a run takes, before it: the passes that its recipe makes, in units of one forward that was timed.

    work = stages_of(recipe, wanted, size)          # stage -> multiply-adds
    seconds = in_seconds(work, size, timed, fitting, recipe)

The constants are what SmolLM2-135M took on one core of a CPU; `tests/pruning/test_estimate.py` has the sizes.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pruning import stages, windows
from pruning.budget import HELD_OUT_WINDOWS, Counts, held_out_rows, window_sizes
from pruning.console import LEAST_SECONDS, Reporter, duration
from pruning.families import head_dim
from pruning.forward.evaluator import Evaluator
from pruning.importance import metric
from pruning.models.loading import DenseModel
from pruning.models.memory import STREAMED_STATE_BYTES
from pruning.models.modeling import blocks_of
from pruning.recipe import Recipe, by_head, limits, recalibrates
from pruning.recovery.prune_aware import GATED
from pruning.search.selection import SHORTLIST
from pruning.variants import REMOVED, narrows
from pruning.variants.narrow_fit import GRADIENT_TOKENS
from pruning.variants.skip_fit import GRADIENT_TOKENS as SKIP_GRADIENT_TOKENS

TIMED_TOKENS = 256
CANDIDATES = 3  # sinks that are tried for every layer
MASKED = 1.4  # time of attention with a mask, in that of causal attention, which leaves out half of the products
CAUSAL = 0.9  # time of a multiply-add of causal attention, in that of one of a matrix product
LOSS = 1.4  # time of the logits and their cross-entropy, in that of the logits
GATES = 3.4  # a forward that is made again for its gradient, and the gradient, in forwards
GATES_LOSS = 3.0
ATTENTION_GRADIENT = 4.0  # of attention to one more size of window, twice forward and once back
GENERATION = 5.0  # of a token that the model writes, in that of one that it reads
FIT = 2.0  # of fitting adapters, in forwards
COMPENSATION = 6.0
TRAINING = 6.0  # of a token that is trained on, the teacher's forward included
RESCORED = 2  # shortlists that a step of greedy search scores
TRIED_PLANS = 3  # until the smallest cache is found that loses little, and the dense model
DISK_BYTES_PER_SECOND = 2**28


@dataclass(frozen=True, slots=True)
class Size:
    """What the time of a pass follows from.

    Attributes:
        layers: L.
        block_weights: Numbers in all blocks; a token costs so many multiply-adds.
        attention_weights: Those of attention.
        head_weights: V · D.
        width: H · d, query features of a layer.
        bytes: Of all weights.
    """

    layers: int
    block_weights: int
    attention_weights: int
    head_weights: int
    width: int
    bytes: int = 0

    def attention(self, rows: int, length: int) -> float:
        """Multiply-adds of all layers' causal attention over rows of `length` tokens, in those of matrix products."""
        return CAUSAL * rows * self.layers * self.width * length**2

    def blocks(self, rows: int, length: int) -> float:
        """Of a forward without logits."""
        return rows * length * self.block_weights + self.attention(rows, length)

    def forward(self, rows: int, length: int) -> float:
        """Of a forward and its loss."""
        return self.blocks(rows, length) + LOSS * rows * length * self.head_weights

    def limited(self, rows: int, length: int) -> float:
        """Of all attention sublayers once more, with windows."""
        return rows * length * self.attention_weights + MASKED * self.attention(rows, length)

    def gradients(self, rows: int, length: int, *, both: bool) -> float:
        """Of a gradient by gates; `both`: gates between two kinds of attention."""
        blocks = self.blocks(rows, length) + (self.limited(rows, length) if both else 0)
        return GATES * blocks + GATES_LOSS * LOSS * rows * length * self.head_weights


def stages_of(recipe: Recipe, wanted: Counts, size: Size) -> dict[str, float]:
    """Multiply-adds of every stage that takes time, by its name; healing by the clock is left out.

    Args:
        recipe: Resolved.
        wanted: How much goes.
        size: Of the model.
    """
    made = _windows(recipe, size) if limits(recipe) else _others(recipe, wanted, size)
    if recipe.ffn_skip is not None:
        made = _with_skipping(recipe, size, made)
    if recipe.heal != "none" and recipe.heal_steps is not None and recipe.heal_minutes is None:
        length = recipe.row_tokens
        made["heal"] = TRAINING * size.forward(max(1, recipe.heal_steps * recipe.heal_batch_tokens // length), length)
    return made


def _with_skipping(recipe: Recipe, size: Size, made: dict[str, float]) -> dict[str, float]:
    """The same with predictors of what FFNs change, and a walk in which each is fitted."""
    length = recipe.row_tokens
    rows = -(-recipe.fit_tokens // length)
    if not limits(recipe):
        made = {"export": made["export"]}
    gradients = size.gradients(max(1, min(rows, SKIP_GRADIENT_TOKENS // length)), length, both=False)
    return made | {
        "score": made.get("score", 0.0) + gradients + size.blocks(rows, length),
        "emulate": FIT * size.blocks(rows, length),
    }


def _windows(recipe: Recipe, size: Size) -> dict[str, float]:
    length = recipe.row_tokens
    rows = -(-recipe.fit_tokens // length)
    tried = min(rows, windows.SINK_ROWS)
    judged = rows + (windows.CODE_PROMPTS if recipe.codes else 0)
    limit = size.blocks(tried, length) + CANDIDATES * size.limited(tried, length)
    held, context = held_out_rows(recipe)
    asked = size.blocks(windows.MEASURED_PROMPTS, context // 2)
    score = limit + _scoring(recipe, size, judged, length, size.layers)
    sizes = window_sizes(recipe)
    if max(sizes) > 1:
        score += ATTENTION_GRADIENT * MASKED * size.attention(judged, length)
        score += _scoring(recipe, size, judged - rows, length, size.layers)  # codes, with larger windows
    if min(sizes) < 1:
        score += _scoring(recipe, size, judged, length, size.layers)
    measured = size.forward(held, context) + asked  # of one plan
    if not by_head(recipe):
        return {"score": score + _bisection(recipe, size, held, context), "export": 2 * measured}
    searched = TRIED_PLANS if recipe.kv_budget is None else 0  # with the dense model; the one chosen is known then
    return {"score": score + searched * measured, "export": (recipe.heal != "none" if searched else 2) * measured}


def _others(recipe: Recipe, wanted: Counts, size: Size) -> dict[str, float]:
    length = recipe.row_tokens
    rows, held = max(1, recipe.fit_tokens // length), HELD_OUT_WINDOWS
    scored = max(1, recipe.score_tokens // length) * (1 + 2 * bool(recipe.copying)) * max(1, len(recipe.task))
    units, count = _units(recipe, wanted, size.layers), _count(wanted)
    score = _scoring(recipe, size, scored, length, units)
    bases = 1.0
    if recipe.search in ("greedy", "exchange"):
        many = min(units, RESCORED * SHORTLIST) if metric(recipe.metric).apart else units
        again = count * (2 if recipe.search == "exchange" else 1)
        score += again * _scoring(recipe, size, scored, length, many)
        bases += again
    elif recipe.search in ("evolutionary", "policy-gradient"):
        score += recipe.generations * (recipe.offspring / 4 + 2) * size.forward(scored, length)
    emulated = recipe.kind != REMOVED
    if recipe.recovery_aware and emulated:
        fitted = min(rows // 2, stages.SEARCH_FIT_TOKENS // length)
        score += 2 * bases * FIT * size.blocks(fitted, length)
    fit = (COMPENSATION if recipe.compensate else FIT) if emulated else 0.0
    if narrows(recipe.kind):
        score = size.gradients(min(rows, GRADIENT_TOKENS // length), length, both=False)
        score += FIT * size.blocks(rows, length)  # the order of the units
    given = bool(recipe.calibration) or recipe.stream or narrows(recipe.kind)
    written = 0.0 if given else GENERATION * size.forward(rows + held, length)
    return {
        "calibrate": written,
        "score": score + _bisection(recipe, size, held, length),
        "emulate": fit * size.blocks(rows, length),
        "export": 3 * size.forward(held, length),
    }


def _scoring(recipe: Recipe, size: Size, rows: int, length: int, units: int) -> float:
    """Of one scoring of `units` units on rows of text, as the metrics' table says; a shared start counts half."""
    row = metric(recipe.metric)
    if recipe.metric == "random":
        return 0.0
    if row.target.startswith("pruning.importance.gradient"):
        return (recipe.draws if row.draws else 1) * size.gradients(rows, length, both=limits(recipe))
    forward = size.forward(rows, length) + (MASKED - 1) * size.attention(rows, length) * limits(recipe)
    if row.apart:
        return (1 + units / 2) * forward
    return (recipe.draws * units * (1 if "2 S" in row.cost else 0.5) if row.draws else 1) * forward


def _bisection(recipe: Recipe, size: Size, rows: int, length: int) -> float:
    """Of the trials that a budget in loss takes."""
    trials = 0 if recipe.max_loss_increase is None else 1 + math.ceil(math.log2(size.layers + 1))
    return trials * size.forward(rows, length)


def announce(dense: DenseModel, recipe: Recipe, wanted: Counts, reporter: Reporter, *, dry_run: bool) -> None:
    """Time a forward, print how long the run will take, and let every stage say its share when it begins."""
    timed, size = timed_forward(dense), size_of(dense)
    with stages.forwards(dense, recipe):
        fitting = timed if recipe.fit_precision == "auto" else timed_forward(dense)
    seconds = in_seconds(stages_of(recipe, wanted, size), size, timed, fitting, recipe)
    if recipe.stream:
        once = size.layers * timed_reading(dense)
        read = readings(recipe) if limits(recipe) else readings_of_a_fit(recipe, wanted, dense)
        seconds = {name: each + once * read.get(name, 0) for name, each in seconds.items()}
    if dry_run:
        seconds = {name: each for name, each in seconds.items() if name in ("calibrate", "score")}
    reporter.expect(seconds)
    parts = ", ".join(f"{name} {duration(each)}" for name, each in seconds.items() if each >= LEAST_SECONDS)
    about = duration(sum(seconds.values()))
    reporter.say(f"estimated time: {about} ({parts or 'all of it short'}; {TIMED_TOKENS} tokens took {timed:.2f} s)")
    if by_head(recipe) and len(stages.journal_of(None, dense, recipe)):
        reporter.say("  less where an earlier search of this model scored the same: that is not done again")


def in_seconds(
    work: Mapping[str, float], size: Size, timed: float, fitting: float, recipe: Recipe
) -> dict[str, float]:  # fmt: skip
    """Seconds of every stage.

    Args:
        work: From `stages_of`.
        size: Of the model.
        timed: Seconds that a forward of one row of `TIMED_TOKENS` took.
        fitting: The same in the arithmetic of choice and fit.
        recipe: Resolved.
    """
    plain = size.blocks(1, TIMED_TOKENS) + TIMED_TOKENS * size.head_weights
    seconds = {name: each / plain * (fitting if name in ("score", "emulate") else timed) for name, each in work.items()}
    if recipe.heal != "none" and "heal" not in seconds:
        seconds["heal"] = 60 * (recipe.heal_minutes or stages.HEALING_MINUTES)
    if recipe.heal == "prune-aware":
        seconds["tune"], seconds["heal"] = GATED * seconds["heal"], (1 - GATED) * seconds["heal"]
    changed = recipe.heal not in ("none", "adapters") or not limits(recipe)
    seconds["export"] += 2 * size.bytes / DISK_BYTES_PER_SECOND if changed else 0
    return seconds


def size_of(dense: DenseModel) -> Size:
    """The sizes of a model in memory."""
    config, blocks = dense.model.config, blocks_of(dense.model, dense.family)
    attention = sum(p.numel() for block in blocks for p in getattr(block, dense.family.attention).parameters())
    return Size(
        layers=len(blocks),
        block_weights=sum(p.numel() for block in blocks for p in block.parameters()),
        attention_weights=attention,
        head_weights=config.vocab_size * config.hidden_size,
        width=config.num_attention_heads * head_dim(config),
        bytes=sum(p.numel() * p.itemsize for p in dense.model.parameters()),
    )


@torch.inference_mode()
def timed_forward(dense: DenseModel) -> float:
    """Seconds of a forward of `TIMED_TOKENS` tokens; the less of two, after a short one that is not counted."""
    config, generator = dense.model.config, torch.Generator().manual_seed(0)
    tokens = min(TIMED_TOKENS, config.max_position_embeddings)
    row = torch.randint(config.vocab_size, (1, tokens), generator=generator)
    if not dense.residency.keeps_blocks:
        return _by_a_block(dense, row) * TIMED_TOKENS / tokens
    row = row.to(dense.model.device)
    dense.model(row[:, :16])
    return min(_seconds(dense, row), _seconds(dense, row)) * TIMED_TOKENS / tokens


def _by_a_block(dense: DenseModel, row: torch.Tensor) -> float:
    """Seconds of a forward of int64 [1, T], from one block's; the less of two."""
    evaluator, size = Evaluator(dense.model, dense.family, row, residency=dense.residency), size_of(dense)
    hidden, arguments = evaluator.embedded([0])[0]
    taken = []
    with dense.residency.block(0):
        for _ in range(2):
            start = time.perf_counter()
            float(evaluator.run_block(0, hidden, arguments[0], {})[0, -1, 0])  # waits for an accelerator
            taken.append(time.perf_counter() - start)
    blocks = size.blocks(1, row.shape[1])
    return min(taken) * size.layers * (blocks + row.shape[1] * size.head_weights) / blocks


def timed_reading(dense: DenseModel) -> float:
    """Seconds until a block is there, read from disk and converted."""
    start = time.perf_counter()
    with dense.residency.block(0):
        return time.perf_counter() - start


def readings(recipe: Recipe) -> dict[str, int]:
    """How often the stages of a window plan read all blocks from disk: for sinks and limits, gates, and figures."""
    judges = 2 if recipe.codes else 1
    sizes = window_sizes(recipe)
    judges += (judges - 1) * (max(sizes) > 1) + judges * (min(sizes) < 1)
    measured = 2 * TRIED_PLANS if recipe.kv_budget is None else 0
    return {"score": 2 + judges * 2 * recipe.draws + measured, "export": 0 if measured else 4}


def readings_of_a_fit(recipe: Recipe, wanted: Counts, dense: DenseModel) -> dict[str, int]:
    """The same of removal. Scores: so many plans at a time as their streams fit into memory; one for a fit; figures."""
    units = _units(recipe, wanted, len(blocks_of(dense.model, dense.family)))
    stream = recipe.score_tokens * dense.model.config.hidden_size * dense.model.dtype.itemsize
    together = max(1, STREAMED_STATE_BYTES // stream)
    row = metric(recipe.metric)

    def scoring(plans: int) -> int:
        if row.target.startswith("pruning.importance.gradient"):
            return 2 * (recipe.draws if row.draws else 1)
        return math.ceil((recipe.draws * plans if row.draws else plans + 1 if row.apart else 1) / together)

    score = scoring(units) if recipe.metric != "random" else 0
    if recipe.search in ("greedy", "exchange"):
        again = _count(wanted) * (2 if recipe.search == "exchange" else 1)
        score += again * scoring(min(units, RESCORED * SHORTLIST) if row.apart else units)
    elif recipe.search in ("evolutionary", "policy-gradient"):
        score += recipe.generations * math.ceil(recipe.offspring / together)
    changed = recipe.compensate or recalibrates(recipe)
    return {"score": score, "emulate": int(recipe.kind != REMOVED or changed), "export": 1 + changed}


def _units(recipe: Recipe, wanted: Counts, layers: int) -> int:
    kinds = (wanted.attention > 0) + (wanted.ffn > 0) + (wanted.blocks > 0) + 2 * (wanted.sublayers > 0)
    return max(1, layers - len(recipe.keep)) * kinds


def _count(wanted: Counts) -> int:
    return wanted.attention + wanted.ffn + wanted.blocks + wanted.sublayers


def _seconds(dense: DenseModel, row: torch.Tensor) -> float:
    start = time.perf_counter()
    dense.model(row).logits[0, -1, 0].item()  # waits for an accelerator
    return time.perf_counter() - start
