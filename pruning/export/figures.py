"""The figures of the reports: drawn once, given as SVG that follows the page's colours and as PNG on white."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.variants import state_of

INK = "#010203"  # stands for the page's own text colour in the SVG
COLOURS = ("#3b7dd8", "#e07b39", "#3a9d5d", "#b0529e", "#8a8f3c", "#d14b4b")
STATES = {"kept": "#3b7dd8", "limited": "#58a07c", "narrowed": "#8d6cc4", "skipped": "#5fb3b3", "emulated": "#e0a339",
          "removed": "#c9c9c9"}  # fmt: skip
MARKS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn figure.

    Attributes:
        name: File name of the PNG, without its ending.
        title: Heading.
        note: One sentence: what to see.
        svg: For the page.
        png: For elsewhere.
    """

    name: str
    title: str
    note: str
    svg: str
    png: bytes

    def save(self, directory: Path) -> None:
        """Write the PNG."""
        (directory / f"{self.name}.png").write_bytes(self.png)


def _draw(name: str, title: str, note: str, size: tuple[float, float], draw: Callable[[Any], None]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
        "svg.hashsalt": name, "legend.frameon": False, "axes.facecolor": "none",
    }  # fmt: skip
    with rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.subplots())
        vector, pixels = io.StringIO(), io.BytesIO()
        canvas.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(pixels, format="png", dpi=120, facecolor="white")
    svg = vector.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Several SVGs share one page: ids must differ, and the width must follow it.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"',
                 r"<svg \1\2\3", svg, count=1)  # fmt: skip
    return Figure(name, title, note, svg, pixels.getvalue())


def importance(values: Mapping[str, float], removed: Mapping[str, str], metric: str, unit: str) -> Figure:
    """Bars: importance of every sublayer by block, coloured by what became of it."""

    def draw(axes: Any) -> None:
        kinds = [kind for kind in ("attention", "ffn", "block") if any(s.startswith(kind + ".") for s in values)]
        width = 0.8 / max(1, len(kinds))
        for column, kind in enumerate(kinds):
            found = {int(s.partition(".")[2]): v for s, v in values.items() if s.startswith(kind + ".")}
            states = [state_of(removed.get(f"{kind}.{b}")) for b in found]
            places, edge = [b + column * width for b in found], INK if column else "none"
            colours = [STATES[state] for state in states]
            axes.bar(places, list(found.values()), width, color=colours, edgecolor=edge, linewidth=0.4)
        axes.set_xlabel("block" + (": " + ", then ".join(kinds) if len(kinds) > 1 else ""))
        axes.set_ylabel(f"{metric}, {unit}")
        positive = [v for v in values.values() if v > 0]
        if positive and max(positive) > 20 * sorted(positive)[len(positive) // 2]:
            axes.set_yscale("symlog", linthresh=max(1e-9, sorted(positive)[len(positive) // 2]))
        for state, colour in STATES.items():
            axes.bar([0], [0], color=colour, label=state)
        axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12))

    note = (
        "How much each sublayer matters by the metric that chose; low ones went. Symmetric log scale where a few tower."
    )
    return _draw("importance", "Importance", note, (9, 3.2), draw)


def strip(num_blocks: int, removed: Mapping[str, str]) -> Figure:
    """The plan: one cell a sublayer."""

    def draw(axes: Any) -> None:
        for row, kind in enumerate(("ffn", "attention")):
            for block in range(num_blocks):
                state = state_of(removed.get(f"{kind}.{block}"))
                axes.barh(row, 0.9, left=block - 0.45, height=0.8, color=STATES[state])
        axes.set_yticks([0, 1], ["FFN", "attention"])
        axes.set_xlabel("block")
        axes.set_xlim(-0.6, num_blocks - 0.4)
        for label, colour in STATES.items():
            axes.barh([0], [0], color=colour, label=label)
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.4))

    return _draw("plan", "Plan", "One column a block, input on the left.", (9, 1.5), draw)


def recovery(dense: float, removed: float | None, pruned: float) -> Figure:
    """Bars: loss of the dense model, with the sublayers simply gone, and with what takes their place."""
    rows = [("dense", dense), *([("removed", removed)] if removed is not None else []), ("as exported", pruned)]

    def draw(axes: Any) -> None:
        colours = [STATES["kept"], STATES["removed"], STATES["emulated"]]
        bars = axes.barh([name for name, _ in rows][::-1], [v for _, v in rows][::-1],
                         color=[colours[0], *colours[1:][-(len(rows) - 1) :]][::-1])  # fmt: skip
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.set_xlabel("loss on held-out calibration text, nats/token")
        axes.margins(x=0.12)

    return _draw(
        "recovery", "Recovery", "What went when the sublayers went, and what their stand-ins gave back.", (9, 1.8), draw
    )


def curves(points: Sequence[Mapping[str, Any]], knees: Mapping[str, int]) -> Figure:
    """Lines: loss increase over number removed, for every chooser and emulation; the knee is ringed."""

    def draw(axes: Any) -> None:
        for index, (name, curve) in enumerate(_lines(points).items()):
            colour, style = _look(points, name)
            x = [p["removed"] for p in curve]
            y = [p["loss_increase"]["value"] for p in curve]
            axes.plot(x, y, style, color=colour, marker=MARKS[index % len(MARKS)], markersize=4, label=", ".join(name))
            low, high = ([p["loss_increase"][end] for p in curve] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            if (knee := knees.get(", ".join(name))) in x:
                axes.plot(knee, y[x.index(knee)], "o", markersize=12, markerfacecolor="none", color=colour)
        axes.set_xlabel("attention sublayers removed")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("loss increase, nats/token")
        axes.legend()

    note = "Lower is better. Bands: 95% over windows, paired with the dense model. Rings: knees."
    return _draw("curves", "Quality against number removed", note, (9, 4.5), draw)


def bytes_front(points: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]]) -> Figure:
    """Dots: perplexity ratio over KV bytes per token, and the Pareto front."""
    from math import exp

    def draw(axes: Any) -> None:
        for index, (name, curve) in enumerate(_lines(points).items()):
            colour, _ = _look(points, name)
            axes.plot([p["kv_per_token"] / 1024 for p in curve], [exp(p["loss_increase"]["value"]) for p in curve],
                      MARKS[index % len(MARKS)], color=colour, markersize=5, label=", ".join(name))  # fmt: skip
        axes.plot([p["kv_per_token"] / 1024 for p in front], [exp(p["loss_increase"]["value"]) for p in front],
                  "-", color=INK, linewidth=1, label="Pareto front")  # fmt: skip
        axes.set_xlabel("KV cache per token, KiB")
        axes.set_ylabel("perplexity / dense")
        axes.set_yscale("log")
        axes.legend()

    return _draw("kv-bytes", "Quality against KV cache", "Left and low is better.", (9, 4), draw)


def kv_curve(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Line and dots: perplexity over the KV cache that stays, predicted and measured."""

    def draw(axes: Any) -> None:
        x = [100 * point["kv_share"] for point in points] + [100]
        axes.plot(x, [point["predicted_ratio"] for point in points] + [1.0], "--", color=COLOURS[0], label="predicted")
        known = [point for point in points if "measured_ratio" in point]
        axes.plot([100 * point["kv_share"] for point in known], [point["measured_ratio"] for point in known], "o",
                  color=COLOURS[1], markersize=5, label="measured")  # fmt: skip
        axes.axhline(1.01, color=INK, linewidth=0.6, linestyle=":")
        axes.set_xlabel("KV cache of a request, % of dense")
        axes.set_ylabel("perplexity / dense")
        axes.legend()

    return _draw("curve", "Perplexity over the KV cache that stays", "Left and low is better.", (9, 4), draw)


def tasks(points: Sequence[Mapping[str, Any]], dense: Mapping[str, Mapping[str, float]]) -> Figure:
    """Lines: what each task loses over number removed, for the emulation and chooser that loses least."""
    best = min(_lines(points).items(), key=lambda item: item[1][-1]["loss_increase"]["value"])

    def draw(axes: Any) -> None:
        for index, task in enumerate(dense):
            found = [(p["removed"], p["tasks"][task]["acc_norm"], p["tasks"][task]["acc_norm_stderr"]) for p in best[1]]
            x, y, error = zip(*found, strict=True)
            axes.errorbar(x, y, error, color=COLOURS[index % len(COLOURS)], marker=MARKS[index % len(MARKS)],
                          markersize=4, capsize=2, label=task)  # fmt: skip
        axes.set_xlabel("attention sublayers removed")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("acc_norm")
        axes.legend()

    return _draw(
        "tasks", "Trade-off by task", f"For {', '.join(best[0])}; bars are one standard error.", (9, 3.5), draw
    )


def costs(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Dots: share of the lost quality that each emulation gave back, over the seconds it took to fit."""
    plain = {(p["chooser"], p["removed"]): p["loss_increase"]["value"] for p in points if p["emulation"] == "none"}

    def draw(axes: Any) -> None:
        names = sorted({p["emulation"] for p in points} - {"none"})
        for index, name in enumerate(names):
            mine = [p for p in points if p["emulation"] == name and plain.get((p["chooser"], p["removed"]), 0) > 0]
            given = [1 - p["loss_increase"]["value"] / plain[p["chooser"], p["removed"]] for p in mine]
            axes.scatter([p["fit_seconds"] for p in mine], given, s=[8 + 3 * p["removed"] for p in mine],
                         color=COLOURS[index % len(COLOURS)], alpha=0.7, label=name)  # fmt: skip
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set_xlabel("seconds to fit")
        axes.set_ylabel("share of the loss given back")
        axes.legend()

    return _draw("costs", "What emulation gives back and costs", "Larger dots: more removed.", (9, 3.5), draw)


def found_map(cells: Sequence[Mapping[str, Any]]) -> Figure:
    """Heat map: share of the answers found, length by task and depth; the dense model's beside it where there is one.

    Args:
        cells: Rows of `pruning.evaluation.long_context.on_long_context`.
    """
    lengths = sorted({cell["length"] for cell in cells})
    names = list(dict.fromkeys(_hidden(cell) for cell in cells))
    panels = {"found": "this model"} | ({"dense_found": "dense"} if "dense_found" in cells[0] else {})
    starts = [panel * (len(lengths) + 0.5) for panel in range(len(panels))]

    def draw(axes: Any) -> None:
        for start, (key, title) in zip(starts, panels.items(), strict=True):
            for cell in cells:
                x, y = start + lengths.index(cell["length"]), names.index(_hidden(cell))
                share = cell[key]["value"]
                axes.barh(y, 0.94, left=x - 0.47, height=0.88, color=_between(STATES["removed"], STATES["kept"], share))
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "#1d2228")
            axes.text(start + (len(lengths) - 1) / 2, -0.75, title, ha="center", va="bottom")
        places = [start + i for start in starts for i in range(len(lengths))]
        axes.set_xticks(places, [str(length) for length in lengths] * len(panels))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.6)
        axes.set_xlim(-0.6, starts[-1] + len(lengths) - 0.4)
        axes.set_xlabel("tokens")
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    note = (
        "Share of the answers that greedy decoding writes exactly, 1 is all. The percentage is the place of what is "
        "asked for, from the start of the text; without one it is spread over the text."
    )
    return _draw("found", "Found in a long context", note, (9, 1.1 + 0.32 * len(names)), draw)


def _hidden(cell: Mapping[str, Any]) -> str:
    return str(cell["kind"]) + ("" if cell["depth"] is None else f", {cell['depth']:.0%}")


def _between(low: str, high: str, share: float) -> str:
    """The colour at a share of the way from one to another, #rrggbb."""
    pairs = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _lines(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    out: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in sorted(points, key=lambda p: p["removed"]):
        out.setdefault((point["chooser"], point["emulation"]), []).append(point)
    return dict(sorted(out.items()))


def _look(points: Sequence[Mapping[str, Any]], name: tuple[str, str]) -> tuple[str, str]:
    choosers = sorted({p["chooser"] for p in points})
    emulations = sorted({p["emulation"] for p in points}, key=lambda e: (e != "none", e))
    colour = COLOURS[choosers.index(name[0]) % len(COLOURS)]
    return colour, ("--", "-", ":", "-.")[emulations.index(name[1]) % 4]
