"""Rewrite the tables of README.md and docs/ from the JSON files: `python benchmarks/tables.py` (`--check` only looks).

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below. Results that are not there
yet leave one line that says so.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """Where tables may stand."""
    return [root / "README.md", *sorted(root.glob("docs/**/*.md"))]


class Results:
    """The JSON files of one directory, by name; one that is missing has no rows."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rows(self, name: str) -> list[dict[str, Any]]:
        return self.document(name).get("rows", [])

    def document(self, name: str) -> dict[str, Any]:
        path = self.directory / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _range(one: Mapping[str, float], digits: int = 2) -> str:
    return f"{one['median']:.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"


def _interval(one: Mapping[str, float], digits: int = 3) -> str:
    return f"{one['value']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"


def _gone(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    share = 1 - Fraction(row["kv_bytes_per_token"], dense["kv_bytes_per_token"])
    return "dense" if share == 0 else f"{share} of attention gone"


def serving(results: Results) -> str:
    """Dense and pruned on vLLM in the same bytes of KV cache, under a load that does not fit at once."""
    found = results.rows("serving")
    head = ["", "tokens in the same KV bytes", "requests/s", "to dense", "predicted", "same batch, to dense"]
    rows = []
    for row in found:
        bound = row["kv_bound"]
        rows.append([
            _gone(row, found[0]), f"{row['kv_pool_tokens']:,}", f"{bound['requests_per_second']['median']:.2f}",
            _range(bound["ratio_to_dense"]), f"{bound['predicted_ratio']:.2f}",
            _range(row["throughput_ratio_same_batch"]),
        ])  # fmt: skip
    return _table(head, rows)


def serving_short(results: Results) -> str:
    """The same in two columns, for README."""
    found = results.rows("serving")
    rows = [
        [_gone(row, found[0]), f"{row['kv_pool_tokens']:,}", f"{row['kv_bound']['ratio_to_dense']['median']:.2f}"]
        for row in found
    ]
    return _table(["", "tokens in the same KV bytes", "requests/s, to dense"], rows)


def _ranged(one: Mapping[str, float]) -> str:
    """With its range, where there is one."""
    return _range(one) if one["low"] < one["high"] else f"{one['median']:.2f}"


def _limited(row: Mapping[str, Any]) -> str:
    return f"{count} layers limited" if (count := row["cache"]["limited"]) else "dense"


def _kv(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    return f"{row['kv_bytes_per_token'] / dense['kv_bytes_per_token']:.0%}"


def serving_windows(results: Results) -> str:
    """Dense and windows on vLLM in the same bytes of KV cache, under a load that does not fit at once."""
    found = results.rows("serving_windows")
    rows = []
    for row in found:
        bound = row["kv_bound"]
        rows.append([
            _limited(row), _kv(row, found[0]), str(row["requests_at_once"]),
            f"{bound['requests_per_second']['median']:.3f}", _ranged(bound["ratio_to_dense"]),
            f"{bound['predicted_ratio']:.2f}", f"{bound['measured_over_predicted']:.2f}",
        ])  # fmt: skip
    head = ["", "KV bytes of a request", "requests at once", "requests/s", "to dense", "predicted"]
    return _table([*head, "measured / predicted"], rows)


def serving_windows_short(results: Results) -> str:
    """The same in three columns, for README."""
    found = results.rows("serving_windows")
    rows = [
        [_limited(row), _kv(row, found[0]), str(row["requests_at_once"]),
         f"{row['kv_bound']['ratio_to_dense']['median']:.2f}"]
        for row in found
    ]  # fmt: skip
    return _table(["", "KV bytes of a request", "requests at once", "requests/s, to dense"], rows)


def latency_windows(results: Results) -> str:
    """The same engines with one request at a time, by its context; ratios are dense / this."""
    found = results.rows("serving_windows")
    contexts = list(found[0]["ttft_seconds"]) if found else []
    rows = []
    for row in found:
        for context in contexts:
            first, between = (1000 * row[key][context]["median"] for key in ("ttft_seconds", "itl_seconds"))
            ratios = [_ranged(row[key][context]) for key in ("ttft_dense_over_this", "itl_dense_over_this")]
            rows.append([_limited(row), f"{int(context):,}", f"{first:.0f}", ratios[0], f"{between:.1f}", ratios[1]])
    return _table(["", "context", "TTFT, ms", "dense / this", "ITL, ms", "dense / this"], rows)


def windows(results: Results) -> str:
    """Windows at several budgets: perplexity over dense, also past half of a row, and codes found by length."""
    return _windows(results, "windows")


def windows_qwen(results: Results) -> str:
    """The same of a larger model."""
    return _windows(results, "windows_qwen")


def windows_2048(results: Results) -> str:
    """The same of a shorter context."""
    return _windows(results, "windows_2048")


def _windows(results: Results, file: str) -> str:
    found: Any = results.document(file).get("rows") or {}
    lengths = list(next(iter(found.values()))["codes"]) if found else []
    rows = []
    for name, row in found.items():
        kv = f"{row['kv_ratio']:.1%}" if "kv_ratio" in row else "100%"
        ratios = [_interval(row[key], 4) if key in row and "kv_ratio" in row else "1" for key in ("perplexity", "late")]
        codes = [f"{row['codes'][length][0]} of {row['codes'][length][1]}" for length in lengths]
        rows.append([name, kv, *ratios, *codes])
    head = ["plan", "KV bytes of a request", "perplexity / dense", "past half of a row"]
    return _table([*head, *(f"codes in {length} tokens" for length in lengths)], rows)


def _found(codes: Mapping[str, Sequence[int]]) -> str:
    return " / ".join(str(found) for found, _ in codes.values())


def window_orders(results: Results) -> str:
    """Which layers or heads stay full at one budget, by every chooser, with the time that it takes."""
    found: Any = results.document("window_orders").get("rows") or {}
    rows = [
        [row["kind"], f"{row['kv_ratio']:.1%}", _interval(row["perplexity"], 4), _found(row["codes"]),
         f"{row['choice_cpu_seconds']:.0f}" if "choice_cpu_seconds" in row else ""]
        for row in sorted(found.values(), key=lambda row: row.get("perplexity", {}).get("value", 0))
        if "kind" in row
    ]  # fmt: skip
    return _table(["chosen by", "KV bytes of a request", "perplexity / dense", "codes found", "CPU s to choose"], rows)


def efforts(results: Results) -> str:
    """One command at each effort: what it says it takes, what it takes, what comes of it."""
    rows = []
    for file in ("efforts", "efforts_2048", "efforts_qwen"):
        document: Any = results.document(file)
        for name, row in (document.get("rows") or {}).items():
            if "effort" in row:
                times = [f"{row[key] / 60:.1f}" for key in ("estimated_seconds", "wall_seconds", "cpu_seconds")]
                rows.append([
                    Path(document["model"]).stem, name, *times, f"{row['peak_mebibytes'] / 1024:.1f}",
                    f"{row['kv_ratio']:.1%}", _interval(row["perplexity"], 4), _found(row["codes"]),
                ])  # fmt: skip
            else:
                rows.append([Path(document["model"]).stem, name, "", "", "", "", "100%", "1", _found(row["codes"])])
    head = ["model", "budget, effort", "estimated, min", "by the clock", "CPU", "peak, GiB", "KV bytes"]
    return _table([*head, "perplexity / dense", "codes found"], rows)


OF_MODELS = {"SmolLM2-135M": "windows", "Qwen2.5-Coder-0.5B": "windows_qwen"}
CHOSEN = ("auto", "head")
"""Choosers of the product as windows.py names them, what it takes by itself first."""


def glance(results: Results) -> str:
    """For a decision: by model and budget what is lost on text and on hidden codes, and what fits."""
    rows = []
    for model, file in OF_MODELS.items():
        found: Any = results.document(file).get("rows") or {}
        dense = next((row for row in found.values() if "kind" not in row), None)
        taken: dict[str, Any] = {}
        mine = [row for row in found.values() if row.get("kind") in CHOSEN]
        for row in sorted(mine, key=lambda each: (CHOSEN.index(each["kind"]), each["window"])):
            taken.setdefault(row["budget"], row)  # of two windows the product takes the smaller under a fifth
        for row in sorted(taken.values(), key=lambda each: -each["kv_ratio"]):
            assert dense is not None
            lost = [100 * (row["perplexity"][key] - 1) for key in ("value", "low", "high")]
            length = max(row["codes"], key=int)
            rows.append([
                model, f"{row['kv_ratio']:.0%}", f"{1 / row['kv_ratio']:.1f}",
                f"{lost[0]:+.1f}% [{lost[1]:+.1f}, {lost[2]:+.1f}]",
                f"{row['codes'][length][0]} (dense {dense['codes'][length][0]}) of {row['codes'][length][1]}",
            ])  # fmt: skip
    return _table(
        ["model", "KV cache kept", "times smaller", "perplexity", "hidden codes found, longest prompts"], rows
    )


def latency(results: Results) -> str:
    """The same engines with one request at a time, and their start."""
    found = results.rows("serving")
    head = ["", "TTFT 128, ms", "TTFT 1024, ms", "TTFT 1024, dense / this", "ITL 128, ms", "ITL 1024, ms",
            "ITL 1024, dense / this", "start, s"]  # fmt: skip
    rows = []
    for row in found:
        first, between = ({c: f"{1000 * one['median']:.0f}" for c, one in row[k].items()}
                          for k in ("ttft_seconds", "itl_seconds"))  # fmt: skip
        rows.append([
            _gone(row, found[0]), first["short"], first["long"], _range(row["ttft_dense_over_this"]["long"]),
            between["short"], between["long"], _range(row["itl_dense_over_this"]["long"]),
            f"{row['start_seconds']:.0f}",
        ])  # fmt: skip
    return _table(head, rows)


def _chooser(row: Mapping[str, Any]) -> str:
    return {"rank": "leave-one-out", "greedy": "greedy", "given": "a given list"}.get(row["chooser"], row["chooser"])


def recovery(results: Results) -> str:
    """Every row of the recovery benchmark."""
    found = [row for row in results.rows("recovery") if "ratio" in row]
    found.sort(key=lambda row: (row["removed"], row["attention"], row["ratio"]))
    rows = [
        [str(row["removed"]), _chooser(row), row["technique"], f"{row['tokens']:,}" if row["tokens"] > 256 else "none",
         f"{row['ratio']:.3f}", f"{row['cpu_seconds']:.0f}", str(row["peak_mib"])]
        for row in found
    ]  # fmt: skip
    head = ["removed", "chosen by", "technique", "tokens fitted on", "perplexity / dense", "CPU s", "peak, MiB"]
    return _table(head, rows)


def healing(results: Results) -> str:
    """What training adds to the closed form."""
    names = {"lora": "adapters and low-rank changes of kept weights (`lora`)", "adapters": "adapters (`adapters`)"}
    rows = [
        [str(len(row["attention"].split(","))), names.get(row["trained"], row["trained"]), f"{row['tokens']:,}",
         f"{row['seconds'] / 60:.0f}", f"{row['ratio_start']:.3f}", f"{row['ratio_end']:.3f}"]
        for row in results.rows("healing")
    ]  # fmt: skip
    return _table(["removed", "trained", "tokens", "minutes", "before", "after"], rows)


def overhead(results: Results) -> str:
    """`prune-serve` over vLLM's own server, paired."""
    rows = []
    for name, one in results.document("overhead").get("ratios", {}).items():
        low, high = one["interval_95"]
        label = name.replace("_ms", "").replace("_", " ").replace("ttft", "TTFT").replace("itl", "ITL")
        shown = (
            f"{one['shoal']:.1f} {one['unit']}",
            f"{one['vllm']:.1f}",
            f"{one['ratio']:.3f} [{low:.3f}, {high:.3f}]",
        )
        rows.append([label, *shown])
    return _table(["", "prune-serve", "vLLM's own", "ratio"], rows)


def quality(results: Results) -> str:
    """Every model of the quality battery beside the dense one, paired."""
    tasks = {"arc_easy": ("ARC-Easy", "acc_norm"), "piqa": ("PIQA", "acc_norm"), "hellaswag": ("HellaSwag", "acc_norm"),
             "mmlu_5shot": ("MMLU, 5 examples", "acc"), "copy": ("copying", "acc")}  # fmt: skip
    rows = []
    for row in results.rows("quality"):
        cells = [row["name"], _interval(row["perplexity_ratio"])]
        for task, (_, key) in tasks.items():
            gap = row[task][f"{key}_difference"]
            cells.append(f"{row[task][key]:.3f}, {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
        rows.append(cells)
    return _table(["", "perplexity / dense", *(label for label, _ in tasks.values())], rows)


def choosers(results: Results) -> str:
    """Perplexity over the dense model's for every chooser's plans, bare and with low-rank adapters, best first."""
    document = results.document("choosers")
    losses, plans = document.get("losses", {}), document.get("plans", {})
    counts = sorted({int(count) for plan in plans.values() for count in plan if count.isdecimal()})
    dense = losses.get("dense", [])

    def ratio(emulation: str, blocks: Sequence[int]) -> float:
        found = losses.get(f"{emulation} {','.join(map(str, sorted(blocks)))}", [math.nan] * len(dense))
        return math.exp(math.fsum(a - b for a, b in zip(found, dense, strict=True)) / len(dense))

    rows = []
    for chooser, plan in plans.items():
        ratios = [ratio(e, plan[str(c)]) for e in ("none", "low_rank") for c in counts if str(c) in plan]
        rows.append((ratios[-1], [chooser, *(f"{r:.3f}" for r in ratios), f"{plan['cpu_seconds']:.0f}"]))
    head = ["chooser", *(f"{c}, {what}" for what in ("bare", "low-rank") for c in counts), "CPU s"]
    return _table(head, [cells for _, cells in sorted(rows)])


def subnetworks(results: Results) -> str:
    """Subnetworks evaluated with shared prefixes against full forwards for every one, the published approach."""
    document = results.document("subnetworks")
    rows = []
    if one := document.get("leave_one_out"):
        rows.append([f"leave-one-out, {one['sublayers']} sublayers", one["shared_prefixes"], one["full_forwards"]])
    if one := document.get("greedy"):
        rows.append([f"greedy, {one['removed']} removed, lazily", one["lazy"], one["full_forwards"]])
        rows.append([f"greedy, {one['removed']} removed, all scored", one["all_scored"], one["full_forwards"]])
    head = ["", "shared prefixes, CPU s", "full forwards, CPU s", "times faster, CPU", "times faster, wall"]
    return _table(head, [
        [name, f"{mine['processor']:.0f}", f"{theirs['processor']:.0f}",
         *(f"{theirs[clock] / mine[clock]:.2f}" for clock in ("processor", "wall"))]
        for name, mine, theirs in rows
    ])  # fmt: skip


def speculation(results: Results) -> str:
    """Pruned checkpoints as drafts of their own dense model."""
    rows = [
        [f"{row['attention_removed']} attention layers gone", f"{row['acceptance']:.2f}",
         f"{row['tokens_per_step']:.2f}", _range(row["speed_ratio"]), row["answers_equal_to_dense"]]
        for row in results.rows("speculation")
    ]  # fmt: skip
    return _table(["draft", "accepted", "tokens a step", "speed, to dense alone", "same answers"], rows)


def peers(results: Results) -> str:
    """Other methods beside windows: bytes, perplexity over dense, codes found, seconds to make; most bytes first."""
    found: Any = results.document("peers").get("rows") or {}
    lengths = list(next(iter(found.values()))["codes"]) if found else []
    rows = []
    for name, row in sorted(found.items(), key=lambda each: -each[1]["kv_ratio"]):
        ratio = _interval(row["perplexity"], 4) if "perplexity" in row else "1"
        codes = [f"{row['codes'][length][0]} of {row['codes'][length][1]}" for length in lengths]
        seconds = "none" if not row.get("cpu_seconds") else f"{row['cpu_seconds']:.0f}"
        rows.append([name, f"{row['kv_ratio']:.1%}", f"{row['weight_ratio']:.1%}", ratio, *codes, seconds])
    head = ["", "KV bytes of a request", "weight bytes", "perplexity / dense"]
    return _table([*head, *(f"codes in {length} tokens" for length in lengths), "CPU s to make"], rows)


def peers_differ(results: Results) -> str:
    """Where each peer comes from, and what is not as there."""
    found: Any = results.document("peers").get("rows") or {}
    rows = [[name, row["source"], row["differs"] or "nothing"] for name, row in found.items() if "source" in row]
    return _table(["", "source", "different here"], rows)


def paper(results: Results) -> str:
    """Perplexity over dense by what goes, by which metric, and how much of it."""
    document = results.document("paper")
    ratios, shares = document.get("ratios") or {}, document.get("settings", {}).get("shares", [])
    names = dict.fromkeys(name.rpartition(" ")[0] for name in ratios)
    rows = []
    for name in sorted(names, key=lambda name: name.split()[0]):
        kind, _, metric = name.partition(" ")
        cells = [ratios.get(f"{name} {share:g}") for share in shares]
        rows.append([kind, metric, *("" if each is None else _interval(each, 2) for each in cells)])
    return _table(["removed", "by", *(f"{share:.0%}" for share in shares)], rows)


def paper_questions(results: Results) -> str:
    """Accuracy of plans, and the difference from dense."""
    found = results.document("paper").get("accuracies") or {}
    sets = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = []
    for name, row in found.items():
        cells = []
        for each in sets:
            one = row.get(each)
            gap = None if one is None else one["difference"]
            cells.append(
                ""
                if gap is None
                else f"{one['accuracy']:.2f}, {gap['value']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"
            )
        rows.append([name, *cells])
    return _table(["removed", *sets], rows)


def paper_emulation(results: Results) -> str:
    """One block gone, with what in its place."""
    found = results.document("paper").get("emulation_ratios") or {}
    blocks = dict.fromkeys(name.split()[0] for name in found)
    kinds = ("none", "bias", "low_rank")
    cells = {name: _interval(each, 3) for name, each in found.items()}
    rows = [[block, *(cells.get(f"{block} {kind}", "") for kind in kinds)] for block in blocks]
    return _table(["block", "gone", "mean update", "low-rank maps"], rows)


def written(results: Results) -> str:
    """Answers that were written after long contexts, judged."""
    rows = []
    for name, cells in (results.document("written").get("summary") or {}).items():
        for cell, one in cells.items():
            rows.append([name, cell, str(one["n"]), _interval(one["share"], 2), _interval(one["difference"], 2)])
    return _table(["", "task, tokens", "n", "right", "difference from dense"], rows)


def skipping(results: Results) -> str:
    """FFNs that tokens skip, and whole FFNs removed: perplexity over dense at each share of runs."""
    rows = []
    for row in results.rows("skipping"):
        ratios = [{name: math.exp(value) for name, value in each["loss_increase"].items()}
                  for each in (row, row["whole_ffns"])]  # fmt: skip
        rows.append([
            f"{row['rate']:.0%}", f"{row['skipped']:.1%}", f"{math.exp(row['predicted_loss_increase']):.2f}",
            _interval(ratios[0], 2), f"{len(row['whole_ffns']['removed'])} FFNs: {_interval(ratios[1], 2)}",
        ])  # fmt: skip
    head = ["asked for", "skipped on this text", "predicted", "perplexity / dense", "whole FFNs removed instead"]
    return _table(head, rows)


def skipping_steps(results: Results) -> str:
    """Time of a decoding step where tokens skip FFNs, over that of the dense model."""
    found = results.document("skipping").get("steps") or {}
    batches = list(next(iter(found.values()), {}))
    rows = []
    for name, cells in found.items():
        label = name if name == "dense" else f"{float(name):.0%}"
        each = [f"{one['processor_ms']:.0f} ms, {one['processor_over_dense']:.2f} ({one['skipped']:.0%} skipped)"
                for one in cells.values()]  # fmt: skip
        rows.append([label, *each])
    return _table(["", *(f"batch {batch}, over dense" for batch in batches)], rows)


TABLES = {
    function.__name__: function
    for function in (
        serving, serving_short, serving_windows, serving_windows_short, windows, windows_qwen, windows_2048,
        window_orders, efforts, latency, latency_windows,
        recovery, healing, overhead, quality, choosers, subnetworks, speculation, glance, peers, peers_differ,
        paper, paper_questions, paper_emulation, written, skipping, skipping_steps,
    )
}  # fmt: skip


def rendered(text: str, results: Results) -> str:
    """The document with every table as the results have it."""

    def table(name: str) -> str:
        made = TABLES[name](results)
        return made if made.count("\n") > 2 else "Not measured yet.\n"

    return BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)


def main() -> None:
    results, check = Results(ROOT / "benchmarks" / "results"), "--check" in sys.argv
    for path in documents(ROOT):
        old = path.read_text(encoding="utf-8")
        if (new := rendered(old, results)) == old:
            continue
        if check:
            sys.exit(f"{path.relative_to(ROOT)} differs from benchmarks/results; run python benchmarks/tables.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
