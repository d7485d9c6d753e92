"""Plans of windows by the defaults of `prune-export`, made once and kept beside a benchmark's results."""

from pathlib import Path
from typing import Any

from pruning.console import Reporter
from pruning.models.plan_file import PLAN
from pruning.pipeline import run
from pruning.recipe import Recipe
from pruning.request import checked_export


def window_plan(model: str, share: str, directory: Path, reporter: Reporter, **recipe: Any) -> Path:
    """The directory of the plan file for a share of the KV cache, such as "30%"; made now where it is not there yet.

    Args:
        model: What `prune-export` takes.
        share: `--kv-budget`.
        directory: Where plans are kept.
        reporter: For progress.
        recipe: What differs from the defaults.
    """
    name = "-".join([share, *(f"{key}-{value}" for key, value in sorted(recipe.items()) if value is not None)])
    output = directory / name.replace("%", "")
    if not (output / PLAN).exists():
        asked = Recipe(kv_budget=share, format="plan", **recipe)
        request = checked_export(model, asked, output, overwrite=True, reporter=reporter)
        run(request, output, dry_run=False, reporter=reporter)
    return output
