"""The model card and the reports: what became of the sublayers, its cost, and the command that reproduces it."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning import __version__
from pruning.console import either
from pruning.errors import RecipeError, StorageError
from pruning.evaluation.evaluate import HEAD, table_rows
from pruning.export import figures
from pruning.export.formats import format_named
from pruning.importance import metric
from pruning.models.checkpoint import Manifest
from pruning.plan import Unit
from pruning.variants import state_of

TASKS_NOTE = (
    "Increase over the dense model by task, in each task's own unit (nats, or share of wrong answers), as chosen."
)


def strip(manifest: Manifest, kind: str) -> str:
    """One letter a block: K kept, L limited, N narrower, S skipped by tokens, E emulated, - removed."""
    letters = {"kept": "K", "limited": "L", "narrowed": "N", "skipped": "S", "emulated": "E", "removed": "-"}
    states = [state_of(manifest.removed.get(f"{kind}.{block}")) for block in range(manifest.num_blocks)]
    return "".join(letters[state] for state in states)


def command(manifest: Manifest, output: str = "DIR") -> str:
    """The command line that makes this checkpoint again."""
    words = ["prune-export", str(manifest.base["model"]), "--output", output]
    for key, value in manifest.recipe.items():
        if value is None or value == []:
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        words += [flag, *(str(v) for v in value)] if isinstance(value, list) else [flag, str(value)]
    return shlex.join(words)


def _quality_rows(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    quality, sizes = manifest.quality, manifest.sizes
    dense, pruned = quality["dense_loss"], quality["pruned_loss"]
    mib = 2**20
    return [
        ("perplexity (held-out calibration text)", f"{math.exp(dense):.3f}", f"{math.exp(pruned):.3f}",
         f"{math.exp(pruned - dense):.4f}"),
        ("weights, MiB", f"{sizes['weights_dense'] / mib:.1f}", f"{sizes['weights'] / mib:.1f}",
         f"{sizes['weights'] / sizes['weights_dense']:.4f}"),
        *_kv_rows(sizes),
        *_code_rows(quality),
        *_skip_rows(quality),
    ]  # fmt: skip


def _kv_rows(sizes: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    """The KV cache by token, or by request where layers keep windows."""
    if sizes.get("kv_request", 0) != sizes["kv_per_token"] * sizes.get("context", 0):
        what, mib = f"a request of {sizes['context']:,} tokens", 2**20
        dense, pruned = sizes["kv_request_dense"], sizes["kv_request"]
        first = f"KV cache of {what}, MiB", f"{dense / mib:.1f}", f"{pruned / mib:.1f}"
    else:
        what, dense, pruned = "a token", sizes["kv_per_token_dense"], sizes["kv_per_token"]
        first = "KV cache, bytes per token", str(dense), str(pruned)
    held = f"{what} fits in 1 GiB of KV cache, times", f"{2**30 // max(1, dense):,}", f"{2**30 // max(1, pruned):,}"
    return [(*first, f"{pruned / dense:.4f}"), (*held, f"{dense / max(1, pruned):.4f}")]


def _code_rows(quality: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Codes hidden far before they are asked for."""
    if "codes" not in quality:
        return []
    dense, pruned = quality["codes_dense"], quality["codes"]
    what = f"of {pruned['asked']} codes hidden in {pruned['length']:,} tokens, found"
    ratio = f"{pruned['found'] / dense['found']:.4f}" if dense["found"] else ""
    return [(what, str(dense["found"]), str(pruned["found"]), ratio)]


def _skip_rows(quality: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """FFN runs that tokens are spared."""
    if "ffn_skipped" not in quality:
        return []
    share = quality["ffn_skipped"]["share"]
    return [("FFN runs on held-out text", "100.0%", f"{1 - share:.1%}", f"{1 - share:.4f}")]


def task_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """What the plan costs every task, and what the plan that each task alone would choose costs them; head first."""
    plans: Mapping[str, Mapping[str, float]] = manifest.quality.get("tasks", {})
    if not plans:
        return []
    tasks = list(next(iter(plans.values())))
    names = {name: name if name == "chosen plan" else f"plan for {name} alone" for name in plans}
    return [("", *tasks), *((names[name], *(f"{costs[t]:+.4f}" for t in tasks)) for name, costs in plans.items())]


def _what_went(manifest: Manifest) -> str:
    """What became of the sublayers, in a few words."""
    states = [state_of(kind) for kind in manifest.removed.values()]
    window = either(_windows(manifest))
    full = sum(len(heads) for heads in manifest.quality.get("full_heads", {}).values())
    but_for = f" (but for {full} of their KV heads)" if full else ""
    parts = [f"{states.count('limited')} limited to the last {window} tokens{but_for}"] if "limited" in states else []
    parts += [f"{states.count('narrowed')} narrowed"] if "narrowed" in states else []
    parts += [f"{states.count('skipped')} skipped by some tokens"] if "skipped" in states else []
    gone = states.count("emulated") + states.count("removed")
    parts += [f"{gone} removed"] if gone else []
    return f"{' and '.join(parts)}, of {2 * manifest.num_blocks} sublayers,"


def _windows(manifest: Manifest) -> list[int | None]:
    """Sizes of the windows of limited layers."""
    usual, own = manifest.recipe.get("window"), manifest.quality.get("windows", {})
    limited = [name.partition(".")[2] for name, kind in manifest.removed.items() if state_of(kind) == "limited"]
    return sorted({own.get(block, usual) for block in limited}) or [usual]


def _sizes(manifest: Manifest) -> str:
    """The windows that are not as most."""
    own = [f"{block}: {size}" for block, size in manifest.quality.get("windows", {}).items()]
    usual = manifest.recipe.get("window")
    return f"Windows by block, where they are not of {usual} tokens: {', '.join(own)}.\n\n" if own else ""


def _full_heads(manifest: Manifest) -> str:
    """The KV heads of limited layers that keep every token."""
    heads = [f"{block}.{head}" for block, some in manifest.quality.get("full_heads", {}).items() for head in some]
    return f"KV heads of limited layers that keep every token (block.head): {', '.join(heads)}.\n\n" if heads else ""


def _units(manifest: Manifest) -> str:
    """How many units each narrower FFN keeps."""
    units = [f"{block}: {n}" for block, n in manifest.quality.get("ffn_units", {}).items()]
    return f"Units that FFNs keep, by block: {', '.join(units)}.\n\n" if units else ""


def _skipped(manifest: Manifest) -> str:
    """How many tokens skip FFNs, in all and by block."""
    found = manifest.quality.get("ffn_skipped")
    if found is None:
        return ""
    blocks = ", ".join(f"{block}: {share:.1%}" for block, share in found["blocks"].items())
    return f"On held-out text {found['share']:.1%} of all FFN runs are skipped; by block {blocks}.\n\n"


def write_card(directory: Path, manifest: Manifest) -> None:
    """Write README.md, the model card."""
    table = "\n".join(f"| {' | '.join(row)} |" for row in _quality_rows(manifest))
    if tasks := task_rows(manifest):
        head, *rows = (f"| {' | '.join(row)} |" for row in tasks)
        table += "\n\n".join(["", TASKS_NOTE, "\n".join([head, "|---" * len(tasks[0]) + "|", *rows])])
    whole = format_named(manifest.recipe.get("format", "shoal")).weights
    serving = "prune-serve DIR" if whole else "prune-serve DENSE --plan DIR"
    (directory / "README.md").write_text(
        "---\ntags: [shoal, depth-pruned]\nlibrary_name: transformers\n---\n\n"
        f"# {manifest.base['model']}, depth-pruned\n\n"
        f"{_what_went(manifest)} by Shoal {manifest.shoal_version}.\n\n"
        "One letter a block: K kept, L limited to a window, N narrower, S skipped by some tokens, E emulated, - "
        "removed.\n\n"
        f"    attention  {strip(manifest, 'attention')}\n    ffn        {strip(manifest, 'ffn')}\n\n"
        f"{_sizes(manifest)}{_full_heads(manifest)}{_units(manifest)}{_skipped(manifest)}"
        f"| | dense | pruned | ratio |\n|---|---|---|---|\n{table}\n\n"
        f"Serve it: `{serving}`. Made by:\n\n    {command(manifest)}\n",
        encoding="utf-8",
    )


def score_table(values: Mapping[Unit, float], errors: Mapping[Unit, float], unit: str) -> str:
    """Scores as text, least important first."""
    rows = [f"{'unit':16}{unit:>16}" + (f"{'+-':>14}" if errors else "")]
    for one in sorted(values, key=lambda u: (values[u], u)):
        rows.append(f"{one!s:16}{values[one]:16.6f}" + (f"{errors[one]:14.6f}" if one in errors else ""))
    return "\n".join(rows)


def _page(title: str, lead: str, tables: Sequence[Mapping[str, Any]], drawn: Sequence[figures.Figure], made_by: str,
          version: str) -> str:  # fmt: skip
    """The report as one HTML file that needs nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(loader=PackageLoader("pruning.export"), autoescape=True, undefined=StrictUndefined)
    return page.get_template("report.html.j2").render(
        title=title, lead=lead, tables=tables, figures=drawn, command=made_by, version=version
    )


def write_report(directory: Path, manifest: Manifest) -> None:
    """Write report.html, and its figures as PNG."""
    drawn = [figures.strip(manifest.num_blocks, manifest.removed)]
    name = str(manifest.recipe.get("importance", ""))
    if name not in manifest.importance:  # scored by no metric of the table
        name = next(iter(manifest.importance), name)
    if values := manifest.importance.get(name):
        drawn.append(figures.importance(values, manifest.removed, name, _unit(name)))
    quality = manifest.quality
    drawn.append(figures.recovery(quality["dense_loss"], quality.get("removed_loss"), quality["pruned_loss"]))
    seconds = [(stage, f"{one['seconds']:.1f}", f"{one['peak_memory_bytes'] / 2**20:.0f}")
               for stage, one in manifest.stages.items()]  # fmt: skip
    tables: list[Mapping[str, Any]] = [
        {"title": "Dense and pruned", "head": ("", "dense", "pruned", "ratio"), "rows": _quality_rows(manifest)},
        {"title": "What it took", "head": ("stage", "seconds", "peak memory, MiB"), "rows": seconds},
    ]
    if tasks := task_rows(manifest):
        head, *costs = tasks
        tables.insert(1, {"title": "By task", "note": TASKS_NOTE, "head": head, "rows": costs})
    lead = f"{_what_went(manifest)}; the model was {manifest.base['model']}."
    title = f"{manifest.base['model']}, depth-pruned"
    page = _page(title, lead, tables, drawn, command(manifest), manifest.shoal_version)
    (directory / "report.html").write_text(page, encoding="utf-8")
    for figure in drawn:
        figure.save(directory)


def _unit(name: str) -> str:
    try:
        return metric(name).unit
    except RecipeError:
        return "as scored"


def write_sweep_report(directory: Path, document: Mapping[str, Any], front: Sequence[Mapping[str, Any]]) -> None:
    """Write report.html and the figures of a sweep."""
    points, judge = document["points"], document["judge"]
    drawn = [figures.curves(points, document["knees"]), figures.bytes_front(points, front)]
    if document["dense"]:
        drawn.append(figures.tasks(points, document["dense"]))
    if {p["emulation"] for p in points} > {"none"}:
        drawn.append(figures.costs(points))
    rows = []
    for label, knee in document["knees"].items():
        point = next(p for p in points if f"{p['chooser']}, {p['emulation']}" == label and p["removed"] == knee)
        low, value, high = (math.exp(point["loss_increase"][k]) for k in ("low", "value", "high"))
        rows.append((label, knee, f"{value:.3f} [{low:.3f}, {high:.3f}]",
                     f"{point['kv_per_token'] / point['kv_per_token_dense']:.3f}",
                     *(_accuracy(point["tasks"][task]) for task in document["dense"])))  # fmt: skip
    tasks = [f"{task}, acc_norm (dense {one['acc_norm']:.3f})" for task, one in document["dense"].items()]
    head = ("chooser, emulation", "removed", "perplexity / dense", "KV / dense", *tasks)
    tables = [{"title": "Knees", "head": head, "rows": rows}]
    lead = (
        f"{len(points)} plans of {document['model']}, judged on {judge['tokens']:,} tokens of {judge['text']} in "
        f"windows of {judge['window']}; dense perplexity {math.exp(judge['dense_loss']):.2f}. 95% intervals."
    )
    page = _page(
        f"{document['model']}: how much can go", lead, tables, drawn, document["command"], document["shoal_version"]
    )
    (directory / "report.html").write_text(page, encoding="utf-8")
    for figure in drawn:
        figure.save(directory)


def _curve_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    dense = document["codes_dense"]
    rows = []
    for point in document["points"]:
        codes = point.get("codes")
        rows.append(
            (
                f"{point['kv_share']:.1%}",
                f"{point['full_heads']} of {point['heads']}",
                f"{point['limited_layers']} ({point['mixed_layers']})",
                f"{point['predicted_ratio']:.4f}",
                f"{point['measured_ratio']:.4f}" if "measured_ratio" in point else "",
                f"{codes['found']} of {codes['asked']}" if codes else "",
            )
        )
    return [*rows, ("100%", "all", "0", "1", "1", f"{dense['found']} of {dense['asked']}" if dense else "")]


CURVE_HEAD = (
    "KV cache", "KV heads full", "layers limited (in part)", "perplexity / dense, predicted", "measured", "codes found"
)  # fmt: skip


def curve_table(document: Mapping[str, Any]) -> str:
    """The curve of `pruning.curve` as text."""
    rows = [CURVE_HEAD, *_curve_rows(document)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(CURVE_HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_curve(directory: Path, document: Mapping[str, Any]) -> None:
    """Write curve.json, report.html and the figure.

    Raises:
        StorageError: A file cannot be written.
    """
    figure = figures.kv_curve(document["points"])
    rows = _curve_rows(document)
    tables = [{"title": "Budgets", "head": CURVE_HEAD, "rows": rows}]
    lead = (
        f"A request of {document['context']:,} tokens, {document['windows']}; perplexity on held-out rows "
        f"of {document['row_tokens']:,} tokens. Any budget: prune-export MODEL --output DIR --kv-budget SHARE."
    )
    made_by = f"prune-export plan {shlex.quote(str(document['model']))}"
    page = _page(
        f"{document['model']}: what a KV budget costs", lead, tables, [figure], made_by, str(document["shoal_version"])
    )
    try:
        directory.mkdir(exist_ok=True)
        (directory / "curve.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (directory / "report.html").write_text(page, encoding="utf-8")
        figure.save(directory)
    except OSError as error:
        raise StorageError(f"cannot write the report in {directory}: {error.strerror or error}") from error


def write_evaluation(directory: Path, found: Mapping[str, Any], made_by: str) -> None:
    """Write report.html and the figures of what `prune-export evaluate` found.

    Args:
        directory: Made where it is not there.
        found: As saved in JSON.
        made_by: The command line.

    Raises:
        StorageError: A file cannot be written.
    """
    cells = found.get("long_context_tasks", [])
    drawn = [figures.found_map(cells)] if cells else []
    tables = [{"title": "Measured", "head": HEAD, "rows": table_rows(found)}]
    against = f" beside the dense model {found['against']}" if found["against"] else ""
    title = f"{found['model']}, measured"
    page = _page(title, f"{found['model']}{against}.", tables, drawn, made_by, __version__)
    try:
        directory.mkdir(exist_ok=True)
        (directory / "report.html").write_text(page, encoding="utf-8")
        for figure in drawn:
            figure.save(directory)
    except OSError as error:
        raise StorageError(f"cannot write the report in {directory}: {error.strerror or error}") from error


def _accuracy(one: Mapping[str, Any]) -> str:
    gap = one["difference"]
    return f"{one['acc_norm']:.3f}: {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
