"""What models write after long contexts, judged: sums, functions with tests, a fact of a long chat, the next line.

    python benchmarks/written.py MODEL --plan DIR... --kinds sums functions chat completion --items 8 --between 2048 \
        --output FILE

The dense model comes first, then each plan or checkpoint; differences are paired by item. Answers are greedy and are
added to FILE as they come; the same line again goes on where it stopped. Functions run in a sandbox (sandbox.py).
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import machine
from tasks import KINDS, Item
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.evaluate import Loaded, load
from pruning.evaluation.paired import bootstrap, wilson


class LineEnd(StoppingCriteria):
    """Stops where a line that is not empty has ended."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        text = self.tokenizer.decode(input_ids[0, self.start :], skip_special_tokens=True)
        done = "\n" in text.lstrip()
        return torch.tensor([done], device=input_ids.device)


def tokens_of(item: Item, tokenizer: Any) -> list[int]:
    """The prompt as the model takes it: by its chat template where it has one and the item is a chat."""
    if isinstance(item.prompt, str):
        return tokenizer(item.prompt, verbose=False)["input_ids"]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(item.prompt, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in item.prompt]
    return tokenizer("\n\n".join([*lines, "Assistant:"]), verbose=False)["input_ids"]


@torch.inference_mode()
def write(subject: Loaded, item: Item) -> tuple[str, int]:
    """What the model writes, greedy, and the tokens of the prompt."""
    ids = tokens_of(item, subject.tokenizer)
    prompt = torch.tensor([ids], device=subject.model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=item.new_tokens, eos_token_id=ends_of(subject), pad_token_id=0
    )
    criteria = StoppingCriteriaList([LineEnd(subject.tokenizer, len(ids))] if item.stop else [])
    out = subject.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config, stopping_criteria=criteria
    )
    return subject.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True), len(ids)


def ends_of(subject: Loaded) -> list[int]:
    """Tokens that end a turn: the configuration's, the tokenizer's, and that of chats in ChatML."""
    known = subject.model.config.eos_token_id
    found = {*(known if isinstance(known, list) else [known]), subject.tokenizer.eos_token_id}
    end = subject.tokenizer.convert_tokens_to_ids("<|im_end|>")
    if isinstance(end, int) and end != subject.tokenizer.unk_token_id:
        found.add(end)
    return sorted(each for each in found if isinstance(each, int))


def summary(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Shares of right answers with intervals, and paired differences from the dense model."""
    shared = [name for name in mine if name in theirs]
    right = [mine[name]["right"] for name in shared]
    gaps = [mine[name]["right"] - theirs[name]["right"] for name in shared]
    share = sum(right) / len(right)
    return {"n": len(right), "share": wilson(share, len(right)).as_dict(), "difference": bootstrap(gaps).as_dict()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="dense model")
    parser.add_argument("checkpoints", nargs="*", help="made from it")
    parser.add_argument("--plan", nargs="*", default=[], help="plans for it")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--items", type=int, default=8, help="of each kind")
    parser.add_argument("--between", type=int, default=2048, help="tokens between what is said and what is asked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options, reporter = arguments(), Reporter()
    quiet_libraries()
    document: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"answers": {}}
    document |= {"model": Path(options.model).name, "machine": machine(), "summary": document.get("summary", {})}
    answers: dict[str, Any] = document["answers"]

    def keep() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")

    subjects: list[tuple[str, str | None]] = [(options.model, None), *((name, None) for name in options.checkpoints)]
    subjects += [(options.model, plan) for plan in options.plan]
    for name, plan in subjects:
        label = "dense" if (name, plan) == (options.model, None) else Path(plan or name).resolve().name
        subject = load(name, options.dtype, "cpu", reporter, plan)

        def count(text: str, subject: Loaded = subject) -> int:
            return len(subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        for kind in options.kinds:
            cell = f"{kind}, {options.between} between"
            known = answers.setdefault(label, {}).setdefault(cell, {})
            for item in islice(KINDS[kind](count, options.between, options.seed), options.items):
                if item.name in known:
                    continue
                start = time.process_time()
                text, tokens = write(subject, item)
                seconds = round(time.process_time() - start, 1)
                known[item.name] = {
                    "right": item.judge(text), "prompt_tokens": tokens, "written": text, "cpu_seconds": seconds,
                }  # fmt: skip
                keep()
                reporter.say(f"{label}, {cell}, {item.name}: {known[item.name]['right']:g} ({seconds} CPU s)")
            document["summary"].setdefault(label, {})[cell] = summary(known, answers["dense"].get(cell, {}))
            keep()


if __name__ == "__main__":
    main()
