"""The stages in order: model, calibration, importance, plan, emulation, checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pruning
from pruning import search
from pruning.calibration import built_in, from_files, read_text
from pruning.checkpoint import Manifest, verify, write_manifest
from pruning.compensation import apply_weights
from pruning.console import Reporter, quiet_libraries
from pruning.emulation import Recovery, recover
from pruning.errors import RecipeError
from pruning.evaluate import loss
from pruning.export import apply_plan, copy_companions, ordinary_config, pruned_config, state_dict, write_weights
from pruning.families import Family
from pruning.importance import metric
from pruning.model import DenseModel, find_model, load_model
from pruning.modeling import blocks_of, places
from pruning.plan import KINDS, EmulationKind, Kind, Plan, Sublayer, kv_bytes_per_token, parse_amount
from pruning.recipe import Recipe
from pruning.report import write_card
from pruning.subnetwork import Evaluator
from pruning.workdir import atomic_directory, check_free_space, check_output

HELD_OUT_WINDOWS = 8
SCORING_STATE_BYTES = 2**26  # hidden states held at once; more is no faster on a CPU


@dataclass(frozen=True, slots=True)
class Counts:
    """How many sublayers of each kind, and whole blocks, to remove."""

    attention: int
    ffn: int
    blocks: int


def counts(recipe: Recipe, num_blocks: int) -> Counts:
    """Resolve the recipe's amounts against a model.

    Raises:
        RecipeError: An amount is malformed, out of range, or leaves no attention layer.
    """
    attention = recipe.attention
    if attention is None and recipe.ffn is None and recipe.blocks is None:
        attention = "33%"
    if recipe.format == "llama" and (attention is not None or recipe.ffn is not None):
        raise RecipeError("--format llama holds whole blocks only; ask for --blocks N, or for --format shoal")
    given = {"attention": attention, "ffn": recipe.ffn, "blocks": recipe.blocks}
    result = Counts(**{k: 0 if v is None else parse_amount(v, num_blocks, k) for k, v in given.items()})
    if result.attention + result.blocks >= num_blocks:
        raise RecipeError(
            f"{result.attention + result.blocks} of {num_blocks} attention layers would go; at least one must stay"
        )
    if result.ffn + result.blocks > num_blocks:
        raise RecipeError(
            f"{result.ffn + result.blocks} of {num_blocks} FFN layers would go; there are only {num_blocks}"
        )
    outside = [block for block in recipe.keep if not 0 <= block < num_blocks]
    if outside:
        raise RecipeError(f"--keep {outside[0]}: blocks are 0 to {num_blocks - 1}")
    free = num_blocks - len(set(recipe.keep))
    if max(result.attention, result.ffn) + result.blocks > free:
        raise RecipeError(f"--keep leaves only {free} blocks to remove from; ask for less")
    return result


def choose(
    evaluator: Evaluator, recipe: Recipe, wanted: Counts, reporter: Reporter
) -> tuple[list[Sublayer], dict[str, float]]:
    """Score the sublayers and choose those to remove; return them and every value."""
    num_blocks = len(evaluator.blocks)
    free = [block for block in range(num_blocks) if block not in recipe.keep]
    kinds: list[Kind] = [k for k in KINDS if getattr(wanted, k) or wanted.blocks]
    everything = [Sublayer(block, kind) for block in range(num_blocks) for kind in kinds]
    function = metric(recipe.importance).load()
    with reporter.progress("scoring", len(everything) * len(evaluator.batches)) as step:
        scores = function(evaluator, everything, recipe.seed, step.advance)
    gone: list[Sublayer] = []
    if wanted.blocks:
        by_block = {Sublayer(b, "attention"): sum(scores[Sublayer(b, kind)] for kind in KINDS) for b in free}
        dropped = search.rank(by_block, wanted.blocks, list(by_block))
        gone += [Sublayer(s.block, kind) for s in dropped for kind in KINDS]
    for kind in KINDS:
        among = [Sublayer(b, kind) for b in free if Sublayer(b, kind) not in gone]
        count = getattr(wanted, kind)
        if not count:
            continue
        if recipe.search == "greedy":
            gone += search.greedy(_rescorer(evaluator, tuple(gone), reporter), count, among)
        else:
            gone += search.rank(scores, count, among)
    return sorted(gone), {str(sublayer): value for sublayer, value in scores.items()}


def _rescorer(
    evaluator: Evaluator, fixed: tuple[Sublayer, ...], reporter: Reporter
) -> Callable[[Sequence[Sublayer], Sequence[Sublayer]], dict[Sublayer, float]]:
    def score(gone: Sequence[Sublayer], rest: Sequence[Sublayer]) -> dict[Sublayer, float]:
        with reporter.progress(f"greedy, {len(gone)} gone", len(rest) * len(evaluator.batches)) as step:
            _, losses = evaluator.leave_one_out(rest, base=[*fixed, *gone], advance=step.advance)
        return {sublayer: float(value.mean()) for sublayer, value in losses.items()}

    return score


def calibrate(dense: DenseModel, recipe: Recipe, reporter: Reporter) -> tuple[Tensor, Tensor]:
    """Tokens to fit on and tokens held out for the quality figures, int64 [n, T] each."""
    length = recipe.sequence_length
    tokens = recipe.calibration_tokens + HELD_OUT_WINDOWS * length
    if recipe.calibration:
        rows = from_files(recipe.calibration, dense.tokenizer, tokens, length, recipe.seed)
    else:
        rows = built_in(dense.model, dense.tokenizer, tokens, length, recipe.seed, reporter)
    return rows[HELD_OUT_WINDOWS:], rows[:HELD_OUT_WINDOWS]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def kv_bytes(dense: DenseModel, kept_attention: int) -> int:
    """KV cache bytes per token with so many attention layers."""
    config = dense.model.config
    return kv_bytes_per_token(kept_attention, config.num_key_value_heads, config.head_dim, dense.model.dtype.itemsize)


def predicted_bytes(dense: DenseModel, wanted: Counts, recipe: Recipe) -> dict[str, int]:
    """Weight and KV bytes before any scoring: sublayers of one kind are all of one size."""
    family, config = dense.family, dense.model.config
    block = blocks_of(dense.model, family)[0]
    sizes = {kind: sum(weight_bytes(getattr(block, name)) for name in places(family, kind)) for kind in KINDS}
    dense_bytes = weight_bytes(dense.model)
    gone = {"attention": wanted.attention + wanted.blocks, "ffn": wanted.ffn + wanted.blocks}
    parameters = {
        "none": 0,
        "bias": config.hidden_size,
        "low-rank": (2 * recipe.rank + 1) * config.hidden_size,
    }
    adapters = (wanted.attention + wanted.ffn) * parameters[recipe.emulation] * dense.model.dtype.itemsize
    return {
        "weights_dense": dense_bytes,
        "weights": dense_bytes - sum(gone[kind] * sizes[kind] for kind in KINDS) + adapters,
        "kv_per_token_dense": kv_bytes(dense, config.num_hidden_layers),
        "kv_per_token": kv_bytes(dense, config.num_hidden_layers - gone["attention"]),
    }


def describe_bytes(sizes: dict[str, int]) -> str:
    """One line for people."""
    weights, kv = (
        sizes["weights"] / sizes["weights_dense"],
        sizes["kv_per_token"] / sizes["kv_per_token_dense"],
    )
    return (
        f"weights {sizes['weights'] / 2**20:.1f} MiB ({weights:.1%} of dense), "
        f"KV cache {sizes['kv_per_token']} bytes per token ({kv:.1%} of dense)"
    )


def plan_of(gone: Sequence[Sublayer], num_blocks: int, recipe: Recipe) -> Plan:
    """The plan: sublayers of a block that goes as a whole are not emulated, all others are."""
    kind: EmulationKind = "low_rank" if recipe.emulation == "low-rank" else recipe.emulation
    if recipe.attention is None and recipe.ffn is None and recipe.blocks is not None:
        kind = "none"
    return Plan(num_blocks, dict.fromkeys(gone, kind), recipe.rank)


def run(
    model: str, output: Path, recipe: Recipe, *, overwrite: bool, dry_run: bool, reporter: Reporter
) -> Manifest | None:
    """Prune a model and write the checkpoint; with `dry_run` only say what would be done.

    Raises:
        UserError: Anything about the request; nothing is written then.
    """
    quiet_libraries()
    metric(recipe.importance)
    if not dry_run:
        check_output(output, overwrite)
    source = find_model(model, reporter)
    num_blocks = source.config.num_hidden_layers
    wanted = counts(recipe, num_blocks)
    if recipe.rank > source.config.hidden_size:
        raise RecipeError(f"--rank {recipe.rank} is over the hidden size {source.config.hidden_size}")
    for path in recipe.calibration:
        read_text(path)
    with reporter.stage("load"):
        dense = load_model(source, recipe.dtype, recipe.device)
    sizes = predicted_bytes(dense, wanted, recipe)
    if not dry_run:
        check_free_space(output, int(sizes["weights"] * 1.05) + 2**24)
    with reporter.stage("calibrate"):
        tokens, held_out = calibrate(dense, recipe, reporter)
    with reporter.stage("score"):
        scoring = tokens[: max(1, recipe.score_tokens // recipe.sequence_length)]
        scorer = Evaluator(dense.model, dense.family, scoring, state_bytes=SCORING_STATE_BYTES)
        gone, scores = choose(scorer, recipe, wanted, reporter)
    plan = plan_of(gone, num_blocks, recipe)
    reporter.say("removing " + ", ".join(map(str, gone)))
    if dry_run:
        reporter.say("predicted: " + describe_bytes(sizes))
        return None
    with reporter.stage("emulate"):
        evaluator = Evaluator(dense.model, dense.family, tokens)
        recovery = recover(evaluator, plan.removed, plan.rank, reporter, compensated=recipe.compensate)
    with reporter.stage("export"), atomic_directory(output) as directory:
        quality = _cut_and_measure(dense, plan, recovery, held_out)
        ordinary = recipe.format == "llama"
        config = ordinary_config(dense.model) if ordinary else pruned_config(dense.model, dense.family, plan)
        sizes["weights"] = write_weights(state_dict(dense.model), directory)
        config.save_pretrained(directory)
        copy_companions(dense.directory, directory)
        manifest = Manifest(
            shoal_version=pruning.__version__,
            base={"model": dense.name, "weight_hash": dense.weight_hash, "dtype": str(dense.model.dtype)[6:]},
            recipe=recipe.model_dump(mode="json"),
            num_blocks=num_blocks,
            removed={str(s): kind for s, kind in plan.removed.items()},
            importance={recipe.importance: scores},
            quality=quality,
            sizes=sizes,
            stages=dict(reporter.stages),
            files={},
        )
        write_card(directory, manifest)
        write_manifest(directory, manifest)
    with reporter.stage("verify"):
        manifest = verify(output)
    reporter.say(f"wrote {output}: {describe_bytes(sizes)}")
    ratio = torch.tensor(quality["pruned_loss"] - quality["dense_loss"]).exp().item()
    reporter.say(f"perplexity on held-out calibration text: {ratio:.3f} times dense")
    return manifest


def _cut_and_measure(dense: DenseModel, plan: Plan, recovery: Recovery, held_out: Tensor) -> dict[str, Any]:
    family: Family = dense.family
    before = loss(dense.model, family, held_out)
    apply_weights(dense.model, recovery.weights)
    apply_plan(dense.model, family, plan, recovery.emulations)
    after = loss(dense.model, family, held_out)
    return {"dense_loss": before, "pruned_loss": after, "text": "held-out calibration windows"}
