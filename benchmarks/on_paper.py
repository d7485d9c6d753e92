"""On paper: what plans hold of a KV cache at the size of 8B and 70B models, from the formula that plans are made with.

    python benchmarks/on_paper.py [--gigabytes 80]

No model is run. A test keeps the formula true to what `prune-export` says of a small model, and the windows' extra
that the engine reserves while a request runs (docs/decisions/engine.md) is left out.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from shapes import SHAPES

from pruning.plan import kv_bytes_of_request, layers_within

MODELS = ("llama-3.1-8b", "llama-3.1-70b")
BUDGETS = (1.0, 0.5, 0.3, 0.2)
CONTEXTS = (8192, 32768)
CACHED = {"bf16": 2, "fp8": 1}
WINDOW_SHARE = 8  # windows of an eighth of the context, as by default


def request_bytes(shape: Mapping[str, Any], budget: float, context: int, number_bytes: int) -> int:
    """KV cache of one request of `context` tokens under a plan by KV head for this budget; 1.0: the dense model."""
    head = 2 * int(shape["head_dim"]) * number_bytes
    total = int(shape["num_hidden_layers"]) * int(shape["num_key_value_heads"])
    limited = 0 if budget == 1.0 else layers_within(budget, total, 1 / WINDOW_SHARE)
    return kv_bytes_of_request(head, total - limited, {context // WINDOW_SHARE: limited}, context)


def tokens_in(size: int, shape: Mapping[str, Any], budget: float, context: int, number_bytes: int) -> int:
    """Tokens that so many bytes of cache hold, in requests of `context` tokens."""
    return size * context // request_bytes(shape, budget, context, number_bytes)


def table(gigabytes: int) -> str:
    """Markdown: tokens that the cache holds, and requests of each context."""
    named = ["dense" if budget == 1.0 else f"{budget:.0%}" for budget in BUDGETS]
    lines = [
        "| shape | cache | KV bytes of a token | " + " | ".join(named) + " |",
        "|---|---|---|" + "---|" * len(BUDGETS),
    ]
    for name in MODELS:
        for cache, number_bytes in CACHED.items():
            shape, size = SHAPES[name], gigabytes * 10**9
            each = request_bytes(shape, 1.0, CONTEXTS[0], number_bytes) // CONTEXTS[0]
            cells = []
            for budget in BUDGETS:
                requests = [size // request_bytes(shape, budget, context, number_bytes) for context in CONTEXTS]
                tokens = tokens_in(size, shape, budget, CONTEXTS[0], number_bytes)
                cells.append(f"{tokens:,} ({' / '.join(map(str, requests))})")
            lines.append(f"| {name} | {cache} | {each:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=int, default=80)
    print(table(parser.parse_args().gigabytes))


if __name__ == "__main__":
    main()
