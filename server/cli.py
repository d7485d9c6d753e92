"""`prune-serve`: settings and vLLM arguments to a running server, errors to one line and an exit code."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from pruning import __version__
from pruning.errors import Interrupted, ShoalError
from server.plugin import GRAMMAR_SECONDS
from server.settings import PREFIX, Settings


def _invalid(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    return f"--{name.replace('_', '-')} ({PREFIX}{name.upper()}): {first['msg']} (got {first['input']!r})"


def _one_line(error: Exception) -> Text:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        return Text("error: " + _invalid(cause))
    return Text("error: " + " ".join(str(error).split()))


app = App(
    name="prune-serve",
    help="Serve a pruned checkpoint or any dense model over vLLM's OpenAI-compatible HTTP API.",
    version=__version__,
    error_console=Console(stderr=True, soft_wrap=True),
    error_formatter=_one_line,
)


@app.default
def serve(
    directory: str,
    *engine: Annotated[str, Parameter(allow_leading_hyphen=True)],
    settings: Annotated[Settings | None, Parameter(name="*")] = None,
) -> int:
    """Serve DIRECTORY until SIGTERM.

    Args:
        directory: A checkpoint of prune-export, or any Hugging Face directory or id (with --plan: of a dense model).
        engine: After `--`: arguments of `vllm serve`, such as --max-model-len 8192.
        settings: How to serve.
    """
    settings = settings or Settings()
    model = _check(directory, settings)
    from server.app import run
    from server.engine.compat import parse_arguments, set_parsers

    os.environ[GRAMMAR_SECONDS] = str(settings.grammar_seconds)  # read within the engine's processes
    logging = ["--logging-config.formatter", settings.log_format]
    args = parse_arguments([model, *logging, *engine], _defaults(directory, settings))
    _check_combination(args, settings)
    _check_ranks(model, args.tensor_parallel_size)
    _check_eager(model, eager=args.enforce_eager)
    set_parsers(args, *_parsers(directory, args.chat_template, settings))
    return run(args, settings)


def _check(directory: str, settings: Settings) -> str:
    """Refuse a damaged checkpoint or plan before vLLM is even imported; return what vLLM is to load."""
    from pruning.models.applied import apply_plan_file
    from pruning.models.checkpoint import is_pruned, verify
    from pruning.models.plan_file import PLAN
    from server.drafts import check_draft
    from server.engine.loader import SKIP_VERIFICATION
    from server.errors import SettingsError

    path = Path(directory)
    looks_local = path.is_absolute() or directory.startswith(("./", "../", "~")) or directory.count("/") != 1
    if not path.is_dir() and looks_local:
        raise SettingsError(f"{directory} is not a directory; give a checkpoint, a model directory or owner/name")
    if settings.api_keys_file is not None:
        from server.auth import read_keys

        read_keys(settings.api_keys_file)
    if settings.plan is not None:
        directory = str(apply_plan_file(directory, settings.plan, _say, hashed=not settings.skip_verification))
        os.environ[SKIP_VERIFICATION] = "1"  # it holds links to what was checked just now
    elif (path / PLAN).is_file() and not (path / "config.json").exists():
        raise SettingsError(f"{directory} holds a plan and no weights; prune-serve DENSE --plan {directory}")
    elif settings.skip_verification:
        os.environ[SKIP_VERIFICATION] = "1"
    elif path.is_dir() and is_pruned(path):
        verify(path)
        os.environ[SKIP_VERIFICATION] = "1"  # the engine need not hash it again
    if settings.draft is not None:
        check_draft(settings.draft, directory, verified=not settings.skip_verification)
        os.environ[SKIP_VERIFICATION] = "1"
    return directory


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _check_combination(args: Namespace, settings: Settings) -> None:
    """Refuse what a draft cannot be combined with."""
    from server.drafts import draft_config
    from server.errors import SettingsError

    if settings.draft is None:
        return
    if args.speculative_config != draft_config(settings.draft, settings.draft_tokens):
        raise SettingsError("--draft and vLLM's --speculative-config exclude each other; give one of them")
    if args.pipeline_parallel_size > 1:
        raise SettingsError("--draft does not work with --pipeline-parallel-size: the last stage would need all of it")


def _check_ranks(directory: str, ranks: int) -> None:
    """Refuse a checkpoint that so many tensor-parallel ranks cannot share, before the engine starts."""
    from server.engine.loader import check_ranks

    config = Path(directory) / "config.json"
    if ranks > 1 and config.is_file():
        check_ranks(json.loads(config.read_text(encoding="utf-8")), ranks)


def _check_eager(directory: str, *, eager: bool) -> None:
    """Refuse a checkpoint whose steps differ in shape where they would be captured, before the engine starts."""
    from server.engine.loader import check_eager

    config = Path(directory) / "config.json"
    if not eager and config.is_file():
        check_eager(json.loads(config.read_text(encoding="utf-8")).get("block_configs") or (), eager=eager)


def _parsers(directory: str, chat_template: str | None, settings: Settings) -> tuple[str | None, str | None]:
    """Parsers of tool calls and of reasoning: as set, else those that fit the chat template."""
    from server.parsers import AUTO, NONE, REASONING, TOOL_CALLS, chosen, read_model_type, read_template

    template = chat_template or read_template(Path(directory))
    if chat_template and Path(chat_template).is_file():
        template = Path(chat_template).read_text(encoding="utf-8", errors="replace")
    names: list[str | None] = []
    for name, rules in ((settings.tool_call_parser, TOOL_CALLS), (settings.reasoning_parser, REASONING)):
        by_template = chosen(rules, template, read_model_type(Path(directory))) if name == AUTO else name
        names.append(None if by_template == NONE else by_template)
    return names[0], names[1]


def _defaults(directory: str, settings: Settings) -> dict[str, Any]:
    """What vLLM's arguments are where the user names none."""
    from server.drafts import draft_config

    draft = settings.draft
    return {
        "host": settings.host,
        "port": settings.port,
        "served_model_name": [Path(directory).resolve().name, *settings.served_model_name],
        "allowed_origins": settings.cors_origins,
        "uvicorn_log_level": settings.log_level,
        "enable_log_requests": settings.log_prompts,
        # Reached by Ctrl-C, which a terminal sends to the engine processes too.
        "shutdown_timeout": int(settings.grace_seconds),
        "max_logprobs": max(settings.max_top_logprobs, settings.max_prompt_logprobs),
        "speculative_config": draft and draft_config(draft, settings.draft_tokens),
    }


def main() -> None:
    """Entry point of the console script."""
    try:
        sys.exit(app())
    except ValidationError as error:
        print(f"error: {_invalid(error)}", file=sys.stderr)
        sys.exit(2)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted while starting", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
