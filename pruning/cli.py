"""`prune-export`: flags to a recipe, the recipe to the pipeline, errors to one line and an exit code."""

import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from pruning import __version__
from pruning.console import Reporter
from pruning.errors import Interrupted, ShoalError
from pruning.plan import UnitKind
from pruning.recipe import Recipe

DEFAULTS = Recipe()


def _one_line(error: Exception) -> Text:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors(include_url=False)[0]
        flag = ".".join(map(str, first["loc"])).replace("_", "-")
        return Text(f"error: --{flag}: {first['msg']} (got {first['input']!r})")
    return Text("error: " + " ".join(str(error).split()))


app = App(
    name="prune-export",
    help="Score the layers of a decoder LLM, remove the least important, emulate them, export a checkpoint.",
    version=__version__,
    error_console=Console(stderr=True, soft_wrap=True),
    error_formatter=_one_line,
)


@app.default
def export(
    model: str,
    *,
    output: Path | None = None,
    recipe: Annotated[Recipe, Parameter(name="*")] = DEFAULTS,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Prune MODEL and write a checkpoint.

    Args:
        model: Hugging Face id or directory, a GGUF file, or smollm2-135m (embedded).
        output: Directory to write.
        recipe: What to remove and how to recover it.
        overwrite: Replace a directory that is not empty.
        dry_run: Print the plan and the predicted bytes; write nothing.
    """
    from pruning.errors import RecipeError
    from pruning.pipeline import run

    if output is None and not dry_run:
        raise RecipeError("--output DIR is missing; say where the checkpoint goes (or --dry-run)")
    run(model, output or Path(), recipe, overwrite=overwrite, dry_run=dry_run, reporter=Reporter())


@app.command(name="score")
def score_units(
    model: str,
    *,
    units: Annotated[list[UnitKind], Parameter(consume_multiple=True)] = ["attention", "ffn"],  # noqa: B006
    output: Path | None = None,
    recipe: Annotated[Recipe, Parameter(name="*")] = DEFAULTS,
) -> None:
    """Print the importance of every sublayer (or block) of MODEL; prune nothing.

    Args:
        model: Hugging Face id or directory, a GGUF file, or smollm2-135m (embedded).
        units: What to score: attention, ffn, block.
        output: JSON file to save the scores in.
        recipe: How to score.
    """
    from pruning.pipeline import score

    score(model, output, recipe, units=units, reporter=Reporter())


@app.command(name="convert")
def convert_checkpoint(directory: Path, *, to: str, output: Path, overwrite: bool = False) -> None:
    """Write a checkpoint again in another export format.

    Args:
        directory: The checkpoint; it stays as it is.
        to: The format; see `prune-export list`.
        output: Directory to write.
        overwrite: Replace a directory that is not empty.
    """
    from pruning.convert import convert

    convert(directory, to, output, overwrite=overwrite, reporter=Reporter())


@app.command(name="list")
def list_metrics() -> None:
    """Print the importance metrics, export formats and model families."""
    from pruning.families import FAMILIES
    from pruning.formats import FORMATS
    from pruning.importance import METRICS

    for name, row in METRICS.items():
        print(f"{name:16}{row.cost:8}{row.source:28}{row.help}")
    for name, form in FORMATS.items():
        print(f"{name:16}{'format':8}{form.help}")
    print("families: " + ", ".join(sorted(FAMILIES)))


@app.command(name="plan-resources")
def print_resources(directory: Path, *, kv_gib: float = 1.0, cores: int = 2) -> None:
    """Print the memory and cores one replica should request, from the checkpoint's bytes.

    Args:
        directory: A checkpoint, or a dense model directory.
        kv_gib: Size of the KV cache on a CPU, GiB.
        cores: To request; the limit is twice that.
    """
    from pruning.errors import RecipeError
    from pruning.resources import plan_resources

    if not (0 < kv_gib < float("inf")) or cores < 1:
        raise RecipeError("--kv-gib must be positive and --cores at least 1")
    print(plan_resources(directory, kv_gib).render(cores))


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    recipe: cyclopts.types.ExistingFile | None = None,
) -> None:
    """Read `--recipe FILE` (YAML) first; flags win over it."""
    files = [recipe] if recipe is not None else []
    app.config = [cyclopts.config.Yaml(path, must_exist=True, use_commands_as_keys=False) for path in files]
    app(tokens)


def main() -> None:
    """Entry point of the console script."""
    try:
        app.meta(sys.argv[1:])
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
