"""`prune-export`: flags to a recipe, the recipe to the pipeline, errors to one line and an exit code."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from pruning import __version__
from pruning.console import Reporter
from pruning.errors import Interrupted, RecipeError, ShoalError
from pruning.help import ABOUT, FIRST, MORE, Help, asked
from pruning.plan import UnitKind
from pruning.recipe import OUTPUT, SEVERAL, Dtype, Emulation, Recipe, limits
from pruning.workdir import unexpected

DEFAULTS = Recipe()


def _one_line(error: Exception) -> Text:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors(include_url=False)[0]
        flag = ".".join(map(str, first["loc"])).replace("_", "-")
        return Text(f"error: --{flag}: {first['msg']} (got {first['input']!r})")
    return Text("error: " + " ".join(str(error).split()))


HELP = Help()
app = App(
    name="prune-export",
    help=ABOUT,
    help_epilogue=MORE,
    help_formatter=HELP,
    version=__version__,
    error_console=Console(stderr=True, soft_wrap=True),
    error_formatter=_one_line,
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False


@app.default
def export(
    model: Annotated[str, FIRST],
    *,
    output: Annotated[Path | None, FIRST] = None,
    recipe: Annotated[Recipe, Parameter(name="*")] = DEFAULTS,
    overwrite: Annotated[bool, OUTPUT] = False,
    dry_run: Annotated[bool, FIRST] = False,
) -> None:
    """Prune MODEL and write a checkpoint.

    Args:
        model: Hugging Face id or directory, a GGUF file, or smollm2-135m (embedded).
        output: Directory to write.
        recipe: What to remove and how to recover it.
        overwrite: Replace a directory that is not empty.
        dry_run: Print the plan and the predicted bytes; write nothing.
    """
    from pruning.request import checked_export

    if output is None and not dry_run:
        raise RecipeError("--output DIR is missing; say where the checkpoint goes (or --dry-run)")
    reporter = Reporter()
    request = checked_export(model, recipe, None if dry_run else output, overwrite=overwrite, reporter=reporter)
    from pruning.pipeline import run

    run(request, output or Path(), dry_run=dry_run, reporter=reporter)


@app.command(name="plan")
def draw_curve(
    model: str,
    *,
    output: Path | None = None,
    measured: int = 3,
    recipe: Annotated[Recipe, Parameter(name="*")] = DEFAULTS,
) -> None:
    """Print what every KV budget costs MODEL, from one search; prune nothing.

    Args:
        model: Hugging Face id or directory, a GGUF file, or smollm2-135m (embedded).
        output: Directory for curve.json and report.html.
        measured: Budgets measured beside the smallest one; the others are predicted.
        recipe: How to choose.
    """
    from pruning.request import Request, checked, within_memory

    reporter = Reporter()
    request = checked(model, recipe, reporter)
    request = Request(request.source, within_memory(request, reporter, exports=False), request.wanted)
    from pruning.curve import curve

    curve(request, output, measured=measured, reporter=reporter)


@app.command(name="score")
def score_units(
    model: str,
    *,
    units: Annotated[list[UnitKind], Parameter(consume_multiple=True)] = [],  # noqa: B006
    output: Path | None = None,
    recipe: Annotated[Recipe, Parameter(name="*")] = DEFAULTS,
) -> None:
    """Print what removing every sublayer (or block) of MODEL costs; with --emulation window, what a window costs.

    Args:
        model: Hugging Face id or directory, a GGUF file, or smollm2-135m (embedded).
        units: What to score: attention, ffn, block; attention and ffn by default, for windows attention.
        output: JSON file to save the scores in.
        recipe: How to score.
    """
    from pruning.request import checked, units_to_score

    reporter = Reporter()
    if recipe.memory is not None:
        raise RecipeError("--memory plans what a whole run takes; for scores give --stream")
    bare = recipe.model_copy(update={"emulation": recipe.emulation or "none"})
    request = checked(model, bare, reporter)
    kinds = units_to_score(request.recipe, units)
    from pruning.pipeline import score

    score(request, output, units=kinds, reporter=reporter)


@app.command(name="convert")
def convert_checkpoint(directory: Path, *, to: str, output: Path, overwrite: bool = False) -> None:
    """Write a checkpoint again in another export format.

    Args:
        directory: The checkpoint; it stays as it is.
        to: The format; see `prune-export list`.
        output: Directory to write.
        overwrite: Replace a directory that is not empty.
    """
    from pruning.export.formats import format_named
    from pruning.models.checkpoint import read_manifest
    from pruning.workdir import check_output

    format_named(to)
    read_manifest(directory)
    check_output(output, overwrite)
    from pruning.export.convert import convert

    convert(directory, to, output, overwrite=overwrite, reporter=Reporter())


@app.command(name="evaluate")
def evaluate_model(
    directory: str,
    *,
    plan: str | None = None,
    against: str | None = None,
    text: Annotated[list[Path], SEVERAL] = [],  # noqa: B006
    text_tokens: int = 20480,
    window: int = 512,
    long_context: Annotated[list[int], SEVERAL] = [],  # noqa: B006
    long_context_tasks: Annotated[list[str], SEVERAL] = [],  # noqa: B006
    lengths: Annotated[list[int], SEVERAL] = [1024, 2048, 4096],  # noqa: B006
    depths: Annotated[list[float], SEVERAL] = [0.1, 0.5, 0.9],  # noqa: B006
    prompts: int = 8,
    filler: Path | None = None,
    choice: Annotated[list[Path], SEVERAL] = [],  # noqa: B006
    letter: Path | None = None,
    letter_examples: Path | None = None,
    shots: int = 5,
    limit: int | None = None,
    generate: int = 0,
    new_tokens: int = 64,
    recall: int = 0,
    tasks: Annotated[list[str], SEVERAL] = [],  # noqa: B006
    include_path: Path | None = None,
    url: str | None = None,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    output: Path | None = None,
    report: Path | None = None,
) -> None:
    """Measure DIRECTORY, a checkpoint or a dense model, on text, questions and generation.

    Args:
        directory: What to measure.
        plan: Plan file to measure a dense model with: a file, its directory or a hub id.
        against: Dense model to compare with, item by item; adds KL, agreement and 95% intervals.
        text: Text files for perplexity.
        text_tokens: Tokens of each text, from its start.
        window: Tokens in one window.
        long_context: Window lengths to measure the first text at as well, such as 2048 4096 8192.
        long_context_tasks: What to hide in long prompts and ask for: needle, keys, values, variable, copy.
        lengths: Tokens of those prompts.
        depths: Where needles and lists to copy stand, from 0 (start) to 1 (end); the others spread over the prompt.
        prompts: Of each task, length and depth.
        filler: Text around what is hidden; by default prose and code that every Python carries.
        choice: Multiple-choice files, JSON lines of context, choices and label.
        letter: MMLU rows (subject, question, choices, label) to ask in its few-shot letter form.
        letter_examples: Rows of the same form that the examples come from.
        shots: Examples before each question of that form.
        limit: Only so many questions of each file, evenly spread, and documents of each task.
        generate: Prompts for the greedy comparison with the dense model; needs --against and --text.
        new_tokens: Tokens it writes.
        recall: Key-value recall prompts, made here: a generation task that needs no data.
        tasks: Tasks of lm-evaluation-harness (shoal[eval]).
        include_path: Directory of task files of your own.
        url: Run the tasks against this server instead, http://HOST:PORT.
        seed: Of the bootstrap and of the recall prompts.
        dtype: Dtype to compute in; auto: float32 on CPU, else the model's own.
        device: cpu, cuda, cuda:1 or auto.
        output: JSON file to save the result in.
        report: Directory to write report.html and its figures in.
    """
    from pruning.errors import EvaluationError, StorageError
    from pruning.evaluation.wanted import LongTasks, Wanted, check

    if (letter is None) != (letter_examples is None):
        raise EvaluationError("--letter and --letter-examples go together")
    if generate and (against is None or not text):
        raise EvaluationError(
            "--generate compares with a dense model after the start of a text: add --against and --text"
        )
    letters = None if letter is None or letter_examples is None else (letter, letter_examples)
    wanted = Wanted(
        text, text_tokens, window, long_context, choice, letters, shots, limit, generate, new_tokens, recall, seed,
        tasks, include_path, url, LongTasks(long_context_tasks, lengths, depths, prompts, filler),
    )  # fmt: skip
    if report is not None and (report.is_file() or not report.resolve().parent.is_dir()):
        raise StorageError(f"cannot write {report}: no directory, and none can be made there")
    reporter = Reporter()
    check(directory, against, wanted, output, reporter)
    from pruning.evaluation.evaluate import evaluate, table

    found = evaluate(
        directory, against, wanted, plan=plan, dtype=dtype, device=device, output=output, reporter=reporter
    )
    if report is not None:
        from pruning.export.report import write_evaluation

        write_evaluation(report, found, shlex.join(["prune-export", *sys.argv[1:]]))
    print(table(found))


@app.command(name="sweep")
def sweep_model(
    model: str,
    *,
    output: Path,
    attention: str = "0..20",
    choosers: Annotated[list[str], SEVERAL] = ["leave-one-out", "cosine", "greedy"],  # noqa: B006
    emulations: Annotated[list[Emulation], SEVERAL] = ["none", "low-rank"],  # noqa: B006
    judge: Path | None = None,
    judge_tokens: int = 8192,
    choice: Annotated[list[Path], SEVERAL] = [],  # noqa: B006
    limit: int | None = None,
    overwrite: bool = False,
    importance: str | None = DEFAULTS.importance,
    rank: int = DEFAULTS.rank,
    keep: Annotated[list[int], SEVERAL] = [],  # noqa: B006
    calibration: Annotated[list[Path], SEVERAL] = [],  # noqa: B006
    calibration_tokens: int | None = DEFAULTS.calibration_tokens,
    score_tokens: int = DEFAULTS.score_tokens,
    sequence_length: int | None = DEFAULTS.sequence_length,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> None:
    """Measure quality over how much attention goes, for several choosers and emulations; goes on where it was stopped.

    Args:
        model: Hugging Face id or directory, a GGUF file, or smollm2-135m (embedded).
        output: Directory for sweep.json, report.html and the figures.
        attention: Budgets: 0..20, 0..20/5 or 2,4,8.
        choosers: Importance metrics, and greedy.
        emulations: What takes the place of what goes.
        judge: Text to judge on; held-out calibration text by default.
        judge_tokens: Of it.
        choice: Multiple-choice files to judge on as well.
        limit: Questions of each.
        overwrite: Replace a directory that is not empty.
        importance: Metric that greedy re-scores with.
        rank: Adapter rank.
        keep: Blocks to leave alone.
        calibration: Text, rows or chats; see the default command.
        calibration_tokens: Tokens the adapters are fitted on.
        score_tokens: Tokens that importance is measured on.
        sequence_length: Tokens in one calibration window.
        seed: Of everything drawn.
        dtype: Dtype to compute in.
        device: cpu, cuda, cuda:1 or auto.
    """
    from pruning.request import Curves, checked_sweep

    recipe = Recipe(
        emulation="none",
        importance=importance, rank=rank, keep=keep, calibration=calibration, calibration_tokens=calibration_tokens,
        score_tokens=score_tokens, sequence_length=sequence_length, seed=seed, dtype=dtype, device=device,
    )  # fmt: skip
    curves = Curves(choosers, emulations, judge, judge_tokens, choice, limit)
    reporter = Reporter()
    request = checked_sweep(model, recipe, curves, attention, output, overwrite=overwrite, reporter=reporter)
    from pruning.sweep import sweep

    found = sweep(request, output, command=shlex.join(["prune-export", *sys.argv[1:]]), reporter=reporter)
    for name, knee in found["knees"].items():
        print(f"knee of {name}: {knee} removed")


@app.command(name="list")
def list_metrics() -> None:
    """Print the importance metrics, kinds of variant, export formats and model families."""
    from pruning.export.formats import FORMATS
    from pruning.families import FAMILIES
    from pruning.importance import METRICS
    from pruning.variants import VARIANTS

    for name, row in METRICS.items():
        print(f"{name:16}{row.cost:8}{row.source:28}{row.help}")
    for name, kind in VARIANTS.items():
        print(f"{name.replace('_', '-'):20}{'--emulation':14}{kind.help}")
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
    from pruning.resources import plan_resources

    if not (0 < kv_gib < float("inf")) or cores < 1:
        raise RecipeError("--kv-gib must be positive and --cores at least 1")
    print(plan_resources(directory, kv_gib).render(cores))


@app.command(name="recipes")
def list_recipes(name: str | None = None) -> None:
    """Print the recipes of this package, a line each; or the YAML of recipe NAME.

    Args:
        name: Recipe to print.
    """
    from pruning.recipes import about, find, shipped

    if name is not None:
        print(find(name).read_text(encoding="utf-8"), end="")
        return
    for each, path in shipped().items():
        print(f"{each:20}{about(path)}")


@dataclass(frozen=True, slots=True)
class FromRecipe:
    """Fills in what the flags leave open: cyclopts calls it with the flags that it found.

    Attributes:
        recipe: `--recipe`, a name or a file.
        effort: `--effort`; the recipe of that name.
    """

    recipe: str | None
    effort: str | None

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Read the recipe and give its values to the arguments that have none."""
        from pruning.recipes import ADAPTERS, find, merged, read

        flags = {argument.name.lstrip("-").replace("-", "_"): argument for argument in arguments if argument.tokens}
        values: dict[str, Any] = {name: flags[name].convert() for name in flags if name in Recipe.model_fields}
        name = self.recipe or self.effort or ""
        if self.effort is not None and not limits(Recipe.model_construct(**values)):
            name += ADAPTERS
        path = find(name)
        given = {*values, *(["heal=none"] if values.get("heal") == "none" else [])}
        Dict(merged(read(path), given), source=str(path), use_commands_as_keys=False)(app, commands, arguments)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    effort: Annotated[Literal["quick", "balanced", "best"] | None, FIRST] = None,
    recipe: Annotated[str | None, FIRST] = None,
) -> None:
    """Read the recipe first; flags win over it.

    Args:
        tokens: The rest of the command line.
        effort: How long: a minute, some minutes, or up to an hour for the embedded model.
        recipe: Instead of --effort: a name of `prune-export recipes` or a YAML file; flags win over it.
    """
    if effort is not None and recipe is not None:
        raise RecipeError("--effort and --recipe both name a recipe; give one")
    try:
        app.config = [] if recipe is None and effort is None else [FromRecipe(recipe, effort)]
        app(tokens)
    finally:
        app.config = []  # it would fill in the flags of this very function, the next time


def main() -> None:
    """Entry point of the console script."""
    try:
        app.meta(asked(sys.argv[1:], HELP))
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001, the last place where it can become one line
        print(f"error: {unexpected(error, ['prune-export', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(ShoalError.exit_code)
    except KeyboardInterrupt:
        print("interrupted; nothing was written, and the same line goes on where this stopped", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
