"""Leave-one-out over every sublayer: shared prefixes against one full forward a sublayer, in one run.

python benchmarks/subnetworks.py smollm2-135m --tokens 512
"""

import argparse
import json
import time
from contextlib import ExitStack

import torch
from torch.nn import functional

from pruning.calibration import standard_library_text
from pruning.console import Reporter, quiet_libraries
from pruning.model import load_dense
from pruning.plan import KINDS, Sublayer
from pruning.subnetwork import Evaluator, removed


def whole(dense, batches, sublayer):
    """Mean loss by transformers' own forward, logits whole; float64 [n]."""
    block = list(dense.model.get_submodule(dense.family.blocks))[sublayer.block]
    parts = []
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(removed(block, dense.family, sublayer.kind))
        for ids in batches:
            logits = dense.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            # Over [N, V]: over a transposed [b, V, T] it is slower and sums the vocabulary less exactly.
            losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            parts.append(losses.view(len(ids), -1).double().mean(1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    quiet_libraries()
    dense = load_dense(arguments.model, "auto", "cpu", Reporter())
    ids = dense.tokenizer(standard_library_text()[: arguments.tokens * 20], verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: arguments.tokens]).view(-1, arguments.length)
    evaluator = Evaluator(dense.model, dense.family, tokens)
    every = [Sublayer(block, kind) for block in range(len(evaluator.blocks)) for kind in KINDS]
    evaluator.loss({})
    seconds = {}
    start = time.perf_counter()
    full = torch.stack([whole(dense, evaluator.batches, sublayer) for sublayer in every])
    seconds["full_forwards"] = time.perf_counter() - start
    start = time.perf_counter()
    alone = torch.stack([evaluator.loss({sublayer: None}) for sublayer in every])
    seconds["chunked_head_no_sharing"] = time.perf_counter() - start
    start = time.perf_counter()
    shared = evaluator.values([{sublayer: None} for sublayer in every])
    seconds["shared_prefixes"] = time.perf_counter() - start
    ratios = {name: value / seconds["shared_prefixes"] for name, value in seconds.items()}
    largest = float((shared - full).abs().max()), float((shared - alone).abs().max())
    result = {
        "sublayers": len(every), "tokens": tokens.numel(), "seconds": seconds, "ratio_to_shared": ratios,
        "largest_difference": {"full_forwards": largest[0], "chunked_head_no_sharing": largest[1]},
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
