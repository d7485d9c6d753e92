"""Rewrite README's tables from the JSON files of the benchmarks: `python benchmarks/tables.py` (`--check` only looks).

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _range(one: dict[str, float], digits: int = 2) -> str:
    return f"{one['median']:.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"


def serving() -> str:
    """Dense and pruned on vLLM."""
    found = _read("serving")
    rows = []
    for row in found["rows"]:
        bound = row["kv_bound"]
        rows.append([
            row["name"], f"{row['kv_pool_tokens']:,}", str(row["requests_at_once"]),
            _range(bound["requests_per_second"], 3),
            _range(bound["ratio_to_dense"]), f"{bound['predicted_ratio']:.2f}", f"{bound['limit']:.2f}",
            _range(row["throughput_ratio_same_batch"]),
        ])  # fmt: skip
    head = [
        "model", "tokens in the KV pool", "requests at once", "requests/s", "to dense", "predicted", "KV limit",
        "same batch, to dense",
    ]  # fmt: skip
    return _table(head, rows)


def rendered(text: str) -> str:
    """The document with every table as the results have it."""
    return BLOCK.sub(lambda block: block[1] + globals()[block[2]]() + block[3], text)


def main() -> None:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = rendered(old)
    if "--check" in sys.argv:
        sys.exit("README.md differs from benchmarks/results; run python benchmarks/tables.py" if new != old else 0)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
