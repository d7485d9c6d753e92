"""Pruned checkpoints as drafts of their own dense model in vLLM, against the dense model alone, paired in one run.

python benchmarks/speculation.py smollm2-135m PRUNED... --output benchmarks/results/speculation.json

Each draft's engine lives beside the dense model's; both answer the same questions one at a time, greedily, in turns.
Reported of each draft:
    acceptance       accepted / guessed tokens, over all places and by place
    tokens_per_step  1 + accepted / steps: what one pass of the dense model yields
    speed_ratio      seconds of the dense model alone / seconds with the draft, of one round
    ceiling          the ratio if every guess were accepted: a step costs the same whatever comes of it, so this is
                     speed_ratio * (1 + guesses) / tokens_per_step

With --acceptance no engine runs: the dense model answers in transformers, and one forward of the draft over question
and answer tells which guesses would have been accepted, as an accepted guess is the dense model's own token.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine
from serving import spread
from worker import Worker, start_worker

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about rain.", "Explain photosynthesis in one sentence.",
    "List three primary colours.", "Who wrote Hamlet?", "Translate 'good morning' into Spanish.",
    "What is 7 times 8?", "Name a mammal that can fly.", "Why is the sky blue?", "Give a synonym of happy.",
    "What do bees make?", "How many days are in a week?", "What is the largest planet?", "Describe a cat.",
    "At what temperature does water boil?", "Tell me a short joke.", "What is a prime number?",
    "Name a red fruit.", "Where is the Eiffel Tower?", "What language is spoken in Brazil?",
]  # fmt: skip


def worker(options: dict[str, Any]) -> None:
    """Serve one model, with a draft or without, to the parent: a round a line in, its answers and times a line out."""
    out, sys.stdout = sys.stdout, sys.stderr
    from vllm import LLM, SamplingParams

    draft = options["draft"] and {
        "method": "draft_model", "model": options["draft"], "num_speculative_tokens": options["guesses"]
    }  # fmt: skip
    llm = LLM(
        options["model"], dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_model_len=512,
        max_num_seqs=1, max_num_batched_tokens=512, disable_log_stats=False, speculative_config=draft,
    )  # fmt: skip
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=load["new"])
        before = _counts(llm)
        began = time.perf_counter()
        answers = [
            llm.chat([{"role": "user", "content": question}], sampling, use_tqdm=False)[0].outputs[0].token_ids
            for question in load["questions"]
        ]
        seconds = time.perf_counter() - began
        counts = {name: _minus(value, before[name]) for name, value in _counts(llm).items()}
        print(json.dumps({"seconds": seconds, "tokens": [list(a) for a in answers]} | counts), file=out, flush=True)


def _counts(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of speculation; empty without a draft."""
    prefix = "vllm:spec_decode_num_"
    metrics = [m for m in llm.get_metrics() if m.name.startswith(prefix)]
    return {m.name.removeprefix(prefix): getattr(m, "values", None) or getattr(m, "value", 0) for m in metrics}


def _minus(after: Any, before: Any) -> Any:
    return [a - b for a, b in zip(after, before, strict=True)] if isinstance(after, list) else after - before


@dataclass
class Engine(Worker):
    """A worker process and its draft."""

    draft: Path | None

    def run(self, questions: list[str], new: int) -> dict[str, Any]:
        """Let it answer all questions."""
        return self.ask({"questions": questions, "new": new})


def start(name: str, model: Path, draft: Path | None, options: argparse.Namespace) -> Engine:
    """Start an engine, wait for it, and let it answer once."""
    served = {"model": str(model), "draft": draft and str(draft), "guesses": options.guesses}
    engine = Engine(name, start_worker(__file__, served, options.threads), draft)
    engine.answer()
    engine.run(QUESTIONS[:1], 8)
    return engine


def row(engine: Engine, found: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any]:
    """What is reported of one draft."""
    assert engine.draft
    removed = json.loads((engine.draft / "pruning.json").read_text())["removed"]
    first = found[0]
    ratio = spread([alone["seconds"] / both["seconds"] for alone, both in zip(dense, found, strict=True)])
    per_step, guesses = 1 + first["accepted_tokens"] / first["drafts"], first["draft_tokens"] / first["drafts"]
    tokens = sum(map(len, dense[0]["tokens"]))
    equal = [mine == theirs for mine, theirs in zip(first["tokens"], dense[0]["tokens"], strict=True)]
    return {
        "name": engine.name,
        "attention_removed": sum(name.startswith("attention.") for name in removed),
        "answers_equal_to_dense": f"{sum(equal)} of {len(equal)}",
        "acceptance": first["accepted_tokens"] / first["draft_tokens"],
        "acceptance_by_place": [count / first["drafts"] for count in first["accepted_tokens_per_pos"]],
        "tokens_per_step": per_step,
        "dense_tokens_per_second": tokens / statistics.median(one["seconds"] for one in dense),
        "rounds": len(found),
        "speed_ratio": ratio,
        "ceiling": ratio["median"] * (1 + guesses) / per_step,
    }


def rounds(engine: Engine, dense: Engine, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """All rounds of a draft's engine and of the dense model's, in turns."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for round_ in range(options.rounds):
        pair = list(zip((engine, dense), found, strict=True))
        for one, answers in pair if round_ % 2 else pair[::-1]:
            answers.append(one.run(QUESTIONS, options.new))
            print(round_, one.name, f"{answers[-1]['seconds']:.1f} s", file=sys.stderr)
    return found


def predicted(model: Path, drafts: list[Path], new: int, guesses: int) -> list[dict[str, Any]]:
    """What vLLM would accept of each draft's greedy guesses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pruning

    pruning.register()
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        whole = dense.generate(**prompt, max_new_tokens=new, do_sample=False)
        answers.append((whole, prompt["input_ids"].shape[1]))
    rows = []
    for path in drafts:
        draft = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        steps, accepted = 0, [0] * guesses
        for whole, length in answers:
            with torch.inference_mode():
                guessed = draft(whole).logits[0, length - 1 : -1].argmax(-1)
            right = (guessed == whole[0, length:]).tolist()
            at = 1  # the dense model's own prefill gives the first token
            while at < len(right):
                run = list(itertools.takewhile(bool, right[at : at + guesses]))
                accepted = [count + (place < len(run)) for place, count in enumerate(accepted)]
                steps, at = steps + 1, at + len(run) + 1
        rows.append({
            "name": path.name, "acceptance": sum(accepted) / (guesses * steps),
            "acceptance_by_place": [count / steps for count in accepted],
            "tokens_per_step": 1 + sum(accepted) / steps,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="dense model")
    parser.add_argument("pruned", nargs="*", type=Path, help="checkpoints made from it")
    parser.add_argument("--guesses", type=int, default=3, help="tokens the draft guesses at a time")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--short", action="store_true", help="one round of short answers")
    parser.add_argument("--acceptance", action="store_true", help="only what would be accepted, without vLLM")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    if not options.pruned:
        parser.error("name a model and at least one checkpoint made from it")
    if options.short:
        options.rounds, options.new = 1, 8
    from pruning.console import Reporter
    from pruning.models.finding import find_model

    model = find_model(options.model, Reporter()).directory
    if options.acceptance:
        print(json.dumps(predicted(model, options.pruned, options.new, options.guesses), indent=1))
        return
    rows: list[dict[str, Any]] = []
    dense = start("dense", model, None, options)
    try:
        for path in options.pruned:
            engine = start(path.name, model, path, options)
            try:
                rows.append(row(engine, *rounds(engine, dense, options)))
            finally:
                engine.process.kill()
            document = {
                "machine": machine(options.threads), "model": options.model, "dtype": "float32",
                "questions": len(QUESTIONS), "new": options.new, "guesses": options.guesses, "rows": rows,
            }  # fmt: skip
            if options.output:  # after every draft, so that a run cut short leaves what it has
                options.output.write_text(json.dumps(document, indent=1) + "\n")
    finally:
        dense.process.kill()
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
