"""Leave-one-out over every sublayer, and greedy removal, against the same by full forwards, in one run.

python benchmarks/subnetworks.py smollm2-135m --output FILE
"""

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn import functional

from pruning.console import Reporter, quiet_libraries
from pruning.forward.blocks import removed
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import load_dense
from pruning.plan import KINDS, Sublayer, Unit
from pruning.search.algorithms import greedy
from pruning.search.selection import SHORTLIST
from pruning.texts.calibration import standard_library_text


def whole(dense, batches, gone):
    """Mean loss by transformers' own forward, logits whole; float64 [n]."""
    blocks = list(dense.model.get_submodule(dense.family.blocks))
    parts = []
    with torch.inference_mode(), ExitStack() as stack:
        for sublayer in gone:
            stack.enter_context(removed(blocks[sublayer.block], dense.family, sublayer.kind))
        for ids in batches:
            logits = dense.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            # Over [N, V]: over a transposed [b, V, T] it is slower and sums the vocabulary less exactly.
            losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            parts.append(losses.view(len(ids), -1).double().mean(1))
    return torch.cat(parts)


def timed(function):
    """Result, wall seconds and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def leave_one_out(dense, evaluator) -> dict:
    every = [Sublayer(block, kind) for block in range(len(evaluator.blocks)) for kind in KINDS]
    evaluator.loss({})
    shared, ours = timed(lambda: evaluator.values([{sublayer: None} for sublayer in every]))
    full, theirs = timed(lambda: torch.stack([whole(dense, evaluator.batches, [sublayer]) for sublayer in every]))
    return {
        "sublayers": len(every), "shared_prefixes": ours, "full_forwards": theirs,
        "times_faster": {clock: theirs[clock] / ours[clock] for clock in ours},
        "largest_difference": float((shared - full).abs().max()),
    }  # fmt: skip


def greedy_removal(dense, evaluator, count: int) -> dict:
    units = [Unit(block, "attention") for block in range(len(evaluator.blocks))]

    def by_full_forwards(gone, rest):
        base = [s for unit in gone for s in unit.sublayers]
        before = whole(dense, evaluator.batches, base).mean()
        return {unit: float(whole(dense, evaluator.batches, [*base, *unit.sublayers]).mean() - before) for unit in rest}

    def by_shared_prefixes(gone, rest):
        candidates = [s for unit in rest for s in unit.sublayers]
        before, after = evaluator.leave_one_out(candidates, [s for unit in gone for s in unit.sublayers])
        return {unit: float(after[unit.sublayers[0]].mean() - before.mean()) for unit in rest}

    lazily, ours = timed(lambda: greedy(by_shared_prefixes, count, units, SHORTLIST))
    plain, all_scored = timed(lambda: greedy(by_shared_prefixes, count, units))
    full, theirs = timed(lambda: greedy(by_full_forwards, count, units))
    return {
        "removed": count, "lazy": ours, "all_scored": all_scored, "full_forwards": theirs,
        "times_faster": {clock: theirs[clock] / ours[clock] for clock in ours},
        "times_faster_all_scored": {clock: theirs[clock] / all_scored[clock] for clock in ours},
        "same_removals": {"lazy": lazily == full, "all_scored": plain == full},
        "order": [unit.block for unit in full],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--greedy-tokens", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    dense = load_dense(options.model, "float32", "cpu", Reporter())
    ids = dense.tokenizer(standard_library_text()[: options.tokens * 20], verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: options.tokens]).view(-1, options.length)
    few = tokens[: max(1, options.greedy_tokens // options.length)]
    result = {
        "model": options.model, "threads": torch.get_num_threads(), "tokens": tokens.numel(),
        "leave_one_out": leave_one_out(dense, Evaluator(dense.model, dense.family, tokens)),
    }  # fmt: skip
    if options.count:
        found = greedy_removal(dense, Evaluator(dense.model, dense.family, few), options.count)
        result["greedy"] = {"tokens": few.numel(), **found}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
