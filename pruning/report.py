"""The model card: what was removed, what it cost and saved, and the command that reproduces it."""

import math
from collections.abc import Mapping
from pathlib import Path

from pruning.checkpoint import Manifest
from pruning.plan import Unit


def strip(manifest: Manifest, kind: str) -> str:
    """One letter a block: K kept, E emulated, - removed."""
    letters = []
    for block in range(manifest.num_blocks):
        emulation = manifest.removed.get(f"{kind}.{block}")
        letters.append("K" if emulation is None else "-" if emulation == "none" else "E")
    return "".join(letters)


def command(manifest: Manifest, output: str = "DIR") -> str:
    """The command line that makes this checkpoint again."""
    words = ["prune-export", str(manifest.base["model"]), "--output", output]
    for key, value in manifest.recipe.items():
        if value is None or value == []:
            continue
        flag = "--" + key.replace("_", "-")
        words += [flag, *(str(v) for v in value)] if isinstance(value, list) else [flag, str(value)]
    return " ".join(words)


def write_card(directory: Path, manifest: Manifest) -> None:
    """Write README.md, the model card."""
    quality, sizes = manifest.quality, manifest.sizes
    dense, pruned = quality["dense_loss"], quality["pruned_loss"]
    rows = [
        ("perplexity (held-out calibration text)", f"{math.exp(dense):.3f}", f"{math.exp(pruned):.3f}",
         math.exp(pruned - dense)),
        ("weight bytes", sizes["weights_dense"], sizes["weights"], sizes["weights"] / sizes["weights_dense"]),
        ("KV cache bytes per token", sizes["kv_per_token_dense"], sizes["kv_per_token"],
         sizes["kv_per_token"] / sizes["kv_per_token_dense"]),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {a} | {b} | {ratio:.4f} |" for name, a, b, ratio in rows)
    (directory / "README.md").write_text(
        "---\ntags: [shoal, depth-pruned]\nlibrary_name: transformers\n---\n\n"
        f"# {manifest.base['model']}, depth-pruned\n\n"
        f"{len(manifest.removed)} sublayers of {2 * manifest.num_blocks} removed by Shoal {manifest.shoal_version}.\n\n"
        "One letter a block: K kept, E emulated, - removed.\n\n"
        f"    attention  {strip(manifest, 'attention')}\n    ffn        {strip(manifest, 'ffn')}\n\n"
        f"| | dense | pruned | ratio |\n|---|---|---|---|\n{table}\n\n"
        f"Serve it: `prune-serve DIR`. Made by:\n\n    {command(manifest)}\n",
        encoding="utf-8",
    )


def score_table(values: Mapping[Unit, float], errors: Mapping[Unit, float], unit: str) -> str:
    """Scores as text, least important first."""
    rows = [f"{'unit':16}{unit:>16}" + (f"{'+-':>14}" if errors else "")]
    for one in sorted(values, key=lambda u: (values[u], u)):
        rows.append(f"{one!s:16}{values[one]:16.6f}" + (f"{errors[one]:14.6f}" if one in errors else ""))
    return "\n".join(rows)
