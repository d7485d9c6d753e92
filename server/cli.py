"""`prune-serve`: our flags to settings, everything after `--` to vLLM, errors to one line and an exit code."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from pruning import __version__
from pruning.errors import ShoalError

ENGINE_DIED = 1


def _one_line(error: Exception) -> Text:
    return Text("error: " + " ".join(str(error).split()))


app = App(
    name="prune-serve",
    help="Serve a depth-pruned (or dense) model behind an OpenAI-compatible HTTP endpoint.",
    version=__version__,
    error_console=Console(stderr=True, soft_wrap=True),
    error_formatter=_one_line,
)


def engine_defaults(given: tuple[str, ...]) -> list[str]:
    """Arguments for vLLM on a CPU that the user did not give: float32, no compilation."""
    flags = {argument.partition("=")[0] for argument in given}
    defaults = [] if flags & {"--dtype"} else ["--dtype", "float32"]
    return defaults if flags & {"--enforce-eager", "--compilation-config", "-O"} else [*defaults, "--enforce-eager"]


@app.default
def serve(
    model: str,
    *engine: Annotated[str, Parameter(allow_leading_hyphen=True)],
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    skip_verification: bool = False,
) -> None:
    """Serve MODEL.

    Args:
        model: A checkpoint of prune-export, or any model directory vLLM serves.
        engine: Arguments after `--` go to vLLM as they are.
        host: Address to listen on.
        port: Port to listen on.
        served_model_name: Name clients use. Default: the directory's name.
        skip_verification: Do not check the checkpoint's files against their hashes.
    """
    from pruning.checkpoint import is_pruned, verify
    from pruning.errors import CheckpointError
    from server.loader import SKIP_VERIFICATION

    path = Path(model)
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(f"{model} is not a model directory (it has no config.json)")
    if is_pruned(path):
        if not skip_verification:
            verify(path)
        os.environ[SKIP_VERIFICATION] = "1"  # checked here, or not to be checked: the engine need not hash it again
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    import uvloop

    from server.app import run
    from server.vllm_compat import is_cpu, parse

    arguments = ["--model", model, "--host", host, "--port", str(port)]
    arguments += ["--served-model-name", served_model_name or path.resolve().name, *engine]
    if is_cpu():
        arguments += engine_defaults(engine)
    if not uvloop.run(run(parse(arguments))):
        sys.exit(ENGINE_DIED)


def main() -> None:
    """Entry point of the console script."""
    try:
        app(sys.argv[1:])
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(0)
