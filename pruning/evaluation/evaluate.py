"""Measure a model, alone or against the dense model it was made from, on everything that was asked for."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import pruning
from pruning.console import Reporter, quiet_libraries
from pruning.errors import EvaluationError, StorageError
from pruning.evaluation.choice import accuracy, answer, differences
from pruning.evaluation.generation import agreement, greedy, recall_prompts, recalled
from pruning.evaluation.harness import run_tasks, run_tasks_on_server
from pruning.evaluation.long_context import on_long_context
from pruning.evaluation.paired import bootstrap, standard_error
from pruning.evaluation.questions import Question
from pruning.evaluation.text import batches_of, compare, loss_by_position, text_windows, token_losses
from pruning.evaluation.wanted import Wanted, questions_of
from pruning.families import Family
from pruning.finite import check_numbers, check_tensors
from pruning.forward.evaluator import Evaluator
from pruning.models.applied import apply_plan_file
from pruning.models.checkpoint import is_pruned, verify
from pruning.models.finding import find_model
from pruning.models.loading import dequantising, load_model
from pruning.models.weight_files import quantisation_of
from pruning.texts.reading import read_text

PROMPT_TOKENS = 32
RECALL_FACTS = 12


def loss(model: PreTrainedModel, family: Family, tokens: Tensor, batch_size: int = 4) -> float:
    """Mean next-token cross-entropy over int64 [n, T], nats/token; `batch_size` rows at a time."""
    return float(Evaluator(model, family, tokens, batch_size).loss({}).mean())


def perplexity_ratio(dense_loss: float, pruned_loss: float) -> float:
    """exp(pruned - dense), both in nats/token."""
    return float(torch.tensor(pruned_loss - dense_loss, dtype=torch.float64).exp())


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to be measured."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def positions(self) -> int:
        """Tokens it can see at once."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 2**31)


def load(name: str, dtype: str, device: str, reporter: Reporter, plan: str | None = None) -> Loaded:
    """Load a checkpoint of ours (every file verified), a dense model, or one with a plan file applied.

    Raises:
        UserError: No such model, or a damaged checkpoint or plan.
    """
    path = Path(name)
    if plan is not None:
        path = apply_plan_file(str(find_model(name, reporter, weights_stay=True).directory), plan, reporter.say)
    if not is_pruned(path):
        dense = load_model(find_model(name, reporter, weights_stay=True), dtype, device)
        return Loaded(dense.model, dense.tokenizer)
    if plan is None:
        verify(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    whole = dequantising(quantisation_of(json.loads((path / "config.json").read_text(encoding="utf-8"))))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=True, **whole).eval().to(device)
    check_tensors(model.state_dict().items(), f"the weights of {name}")
    return Loaded(model, AutoTokenizer.from_pretrained(path, local_files_only=True))


def on_text(subject: Loaded, dense: Loaded | None, windows: Tensor, seed: int, reporter: Reporter) -> dict[str, Any]:
    """Loss and perplexity on int64 [n, T]; against a dense model also ratio, KL and top-1 agreement."""
    out: dict[str, Any] = {"tokens": windows.numel(), "window": windows.shape[1]}
    with reporter.progress("text", len(batches_of(windows))) as step:
        if dense is None:
            alone = token_losses(subject.model, windows, step.advance)
            check_numbers({"loss": alone.mean}, "text")
            return out | {"loss": alone.mean, "perplexity": alone.perplexity, "by_position": loss_by_position(alone)}
        both = compare(dense.model, subject.model, windows, step.advance)
    check_numbers({"loss": both.other.mean, "dense loss": both.reference.mean}, "text")
    increase = bootstrap((both.other.windows - both.reference.windows).tolist(), seed)
    return out | {
        "loss": both.other.mean,
        "perplexity": both.other.perplexity,
        "dense_loss": both.reference.mean,
        "dense_perplexity": both.reference.perplexity,
        "ratio": increase.mapped(math.exp).as_dict(),
        "kl": bootstrap(both.divergence.double().mean(1).tolist(), seed).as_dict(),
        "top1_agreement": bootstrap(both.agrees.double().mean(1).tolist(), seed).as_dict(),
        "by_position": loss_by_position(both.other),
        "dense_by_position": loss_by_position(both.reference),
    }


def on_questions(
    subject: Loaded, dense: Loaded | None, questions: Sequence[Question], seed: int, reporter: Reporter
) -> dict[str, Any]:
    """Accuracies with standard errors; against a dense model also its own and the paired differences."""
    models = 1 if dense is None else 2
    with reporter.progress(questions[0].task, models * len(questions)) as step:
        mine = answer(subject.model, subject.tokenizer, questions, step.advance)
        out: dict[str, Any] = {**accuracy(mine), "chance": _chance(questions)}
        if dense is None:
            return out
        theirs = answer(dense.model, dense.tokenizer, questions, step.advance)
    out |= {f"dense_{key}": value for key, value in accuracy(theirs).items() if key != "n"}
    out |= differences(mine, theirs, seed)
    return out


def _chance(questions: Sequence[Question]) -> float:
    return math.fsum(1 / len(question.choices) for question in questions) / len(questions)


def on_recall(subject: Loaded, dense: Loaded | None, count: int, seed: int, reporter: Reporter) -> dict[str, Any]:
    """Share of key-value recalls that are written out right; see `generation.recall_prompts`."""
    prompts = recall_prompts(count, RECALL_FACTS, seed)
    with reporter.progress("recall", count * (1 if dense is None else 2)) as step:
        mine = [float(x) for x in recalled(subject.model, subject.tokenizer, prompts, step.advance)]
        out: dict[str, Any] = {"n": count, "facts": RECALL_FACTS, "exact_match": math.fsum(mine) / count,
                               "exact_match_stderr": standard_error(mine)}  # fmt: skip
        if dense is not None:
            theirs = [float(x) for x in recalled(dense.model, dense.tokenizer, prompts, step.advance)]
            out["dense_exact_match"] = math.fsum(theirs) / count
            difference = [a - b for a, b in zip(mine, theirs, strict=True)]
            out["exact_match_difference"] = bootstrap(difference, seed).as_dict()
    return out


def on_generation(subject: Loaded, dense: Loaded, windows: Tensor, count: int, new_tokens: int) -> dict[str, Any]:
    """How many tokens both write alike, greedily, after the first tokens of `count` windows."""
    prompts = windows[:: max(1, len(windows) // count)][:count, :PROMPT_TOKENS]
    lengths = agreement(greedy(subject.model, prompts, new_tokens), greedy(dense.model, prompts, new_tokens))
    return {
        "prompts": len(prompts), "new_tokens": new_tokens, "lengths": lengths,
        "mean_agreement": sum(lengths) / len(lengths),
        "all_agree": sum(n == new_tokens for n in lengths) / len(lengths),
    }  # fmt: skip


def evaluate(
    name: str, against: str | None, wanted: Wanted, *, dtype: str, device: str, output: Path | None,
    reporter: Reporter, plan: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Load, measure, save as JSON if asked; return what is saved.

    Raises:
        UserError: Anything about the request.
    """
    quiet_libraries()
    found: dict[str, Any] = {"model": name, "against": against} | ({} if plan is None else {"plan": plan})
    if wanted.of_model or wanted.url is None:
        with reporter.stage("load"):
            subject = load(name, dtype, device, reporter, plan)
            dense = load(against, dtype, device, reporter) if against is not None else None
        with reporter.stage("measure"):
            found |= measure(subject, dense, wanted, reporter)
    if wanted.tasks:
        with reporter.stage("tasks"):
            if wanted.url is not None:
                served = Path(name).resolve().name
                found["tasks"] = run_tasks_on_server(
                    wanted.url, served, name, wanted.tasks, wanted.include, wanted.limit
                )
            else:
                found["tasks"] = run_tasks(subject.model, subject.tokenizer, wanted.tasks, wanted.include, wanted.limit)
    if output is not None:
        try:
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {output}: {error.strerror or error}") from error
    return found


def measure(subject: Loaded, dense: Loaded | None, wanted: Wanted, reporter: Reporter) -> dict[str, Any]:
    """Measure all that is wanted; the result is ready for JSON.

    Raises:
        EvaluationError: Text or questions that do not fit, or models that cannot be compared.
    """
    if dense is not None and dense.model.config.vocab_size != subject.model.config.vocab_size:
        raise EvaluationError("the two models have different vocabularies; give the dense model it was pruned from")
    longest = max([wanted.window, *wanted.long_context])
    if wanted.text and longest > subject.positions:
        raise EvaluationError(f"a window of {longest} tokens is over the model's {subject.positions} positions")
    long_tasks = wanted.long_tasks
    if long_tasks.kinds and (longest := max(long_tasks.lengths)) > subject.positions:
        raise EvaluationError(
            f"a prompt of {longest} tokens is over the model's {subject.positions} positions; lower --lengths"
        )
    sets = questions_of(wanted)
    texts = {path: read_text(path, subject.tokenizer) for path in wanted.text}
    cut = {
        path: text_windows(text, subject.tokenizer, wanted.window, wanted.text_tokens) for path, text in texts.items()
    }
    out: dict[str, Any] = {"shoal_version": pruning.__version__, "seed": wanted.seed}
    if cut:
        out["text"] = {path.name: on_text(subject, dense, w, wanted.seed, reporter) for path, w in cut.items()}
    if wanted.long_context and texts:
        text, longest = next(iter(texts.values())), max(wanted.long_context)
        whole = text_windows(text, subject.tokenizer, longest, longest)
        out["long_context"] = {
            str(length): on_text(
                subject, dense, whole[0, : longest // length * length].view(-1, length), wanted.seed, reporter
            )
            for length in wanted.long_context
        }
    if sets:
        out["choice"] = {
            questions[0].task: on_questions(subject, dense, questions, wanted.seed, reporter) for questions in sets
        }
    if wanted.recall:
        out["recall"] = on_recall(subject, dense, wanted.recall, wanted.seed, reporter)
    if long_tasks.kinds:
        theirs = None if dense is None else dense.model
        out["long_context_tasks"] = on_long_context(
            subject.model, theirs, subject.tokenizer, long_tasks, wanted.seed, reporter
        )
    if wanted.generate and dense is not None and cut:
        first = next(iter(cut.values()))
        out["generation"] = on_generation(subject, dense, first, wanted.generate, wanted.new_tokens)
    return out


HEAD = ("", "value", "dense", "95% interval")


def table(found: Mapping[str, Any]) -> str:
    """The result for people, aligned; see `table_rows`."""
    rows = [HEAD, *table_rows(found)]
    width = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width[i]) for i, cell in enumerate(row)).rstrip() for row in rows)


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """One row a measurement, with the dense model's and the 95% interval of the comparison, under `HEAD`."""
    rows: list[tuple[str, str, str, str]] = []
    for label, each in (("", found.get("text", {})), ("context ", found.get("long_context", {}))):
        for name, one in each.items():
            dense = f"{one['dense_perplexity']:.3f}" if "dense_perplexity" in one else ""
            ratio = f"ratio {_interval(one['ratio'])}" if "ratio" in one else ""
            rows.append((f"perplexity, {label}{name}", f"{one['perplexity']:.3f}", dense, ratio))
            if "kl" in one and not label:
                rows.append(("  KL from dense, nats/token", f"{one['kl']['value']:.4f}", "", _interval(one["kl"])))
                share = one["top1_agreement"]
                rows.append(("  top-1 agreement with dense", f"{share['value']:.4f}", "", _interval(share)))
    for task, one in found.get("choice", {}).items():
        for key in ("acc", "acc_norm"):
            value = f"{one[key]:.4f} ± {one[f'{key}_stderr']:.4f}"
            dense = f"{one[f'dense_{key}']:.4f}" if f"dense_{key}" in one else ""
            gap = f"difference {_interval(one[f'{key}_difference'])}" if dense else ""
            rows.append((f"{task} {key} ({one['n']}, chance {one['chance']:.2f})", value, dense, gap))
    if one := found.get("recall"):
        dense = f"{one['dense_exact_match']:.4f}" if "dense_exact_match" in one else ""
        gap = f"difference {_interval(one['exact_match_difference'])}" if dense else ""
        value = f"{one['exact_match']:.4f} ± {one['exact_match_stderr']:.4f}"
        rows.append((f"recall, exact match ({one['n']}, {one['facts']} facts)", value, dense, gap))
    rows += [row for one in found.get("long_context_tasks", ()) for row in _long_rows(one)]
    if one := found.get("generation"):
        label = f"greedy tokens as dense (of {one['new_tokens']}, {one['prompts']} prompts)"
        rows.append((label, f"{one['mean_agreement']:.1f}", "", f"all alike {one['all_agree']:.0%}"))
    for task, values in found.get("tasks", {}).items():
        rows += [(f"{task} {k}", f"{v:.4f}", "", "") for k, v in values.items() if isinstance(v, float)]
    return rows


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"


def _long_rows(one: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    label = f"{one['kind']}, {one['length']} tokens" + ("" if one["depth"] is None else f", depth {one['depth']:g}")
    rows = []
    for name, key in ((f"{label}: found of {one['answers']}", "found"), ("  NLL, nats/token", "nll")):
        dense = f"{one[f'dense_{key}']['value']:.4f}" if f"dense_{key}" in one else ""
        interval = f"difference {_interval(one[f'{key}_difference'])}" if dense else _interval(one[key])
        rows.append((name, f"{one[key]['value']:.4f}", dense, interval))
    return rows
