"""The application: vLLM's own with Shoal's routes and middleware around it, run to its end."""

import logging
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.types import ASGIApp

from pruning.checkpoint import Manifest, is_pruned, read_manifest
from server import vllm_compat
from server.inventory import Inventory, take_inventory
from server.lifecycle import Gate, Lifecycle, supervise
from server.metrics import publish
from server.settings import Settings

logger = logging.getLogger("shoal.app")


def assemble(app: FastAPI, settings: Settings, lifecycle: Lifecycle) -> ASGIApp:
    """Add Shoal's routes to vLLM's application and put our middleware around it.

    vLLM hands the application over with its middleware stack already built, so ours wraps the whole.
    """
    app.router.routes[:0] = lifecycle.routes()
    return Gate(app, lifecycle, settings.retry_after_seconds)


def announce(inventory: Inventory, args: Namespace) -> None:
    """Print what the cache holds and a line to try."""
    scheme = "https" if args.ssl_certfile else "http"
    host = "localhost" if args.host in ("0.0.0.0", "::", None, "") else args.host
    print(inventory.line())
    print(
        f"Try: curl {scheme}://{host}:{args.port}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{args.served_model_name[0]}", "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}\'',
        flush=True,
    )


async def serve(args: Namespace, settings: Settings, sock: Any, client_config: dict[str, Any] | None = None) -> int:
    """Start the engine, serve until the end, and return the exit code."""
    lifecycle = Lifecycle()
    directory = Path(args.model)
    manifest: Manifest | None = read_manifest(directory) if is_pruned(directory) else None
    async with vllm_compat.open_engine(args, client_config) as engine:
        inventory = take_inventory(directory, manifest, vllm_compat.engine_facts(engine))
        publish(inventory)
        stock = await vllm_compat.stock_app(engine, args)
        # vLLM's error handlers stop `state.server` at the first error of a dead engine; ours is stopped by `supervise`.
        stock.state.server = SimpleNamespace(should_exit=False)
        config = uvicorn.Config(
            assemble(stock, settings, lifecycle),
            log_level=settings.log_level,
            timeout_graceful_shutdown=2,
            **vllm_compat.uvicorn_options(args),
        )
        config.load()
        server = vllm_compat.http_server(config, client_config)
        return await supervise(
            lifecycle, [(server, [sock])], engine, settings.grace_seconds, lambda: announce(inventory, args)
        )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def run(args: Namespace, settings: Settings) -> int:
    """Serve in this process and return the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)  # until the event loop takes it over
    with vllm_compat.listen(args) as sock:
        return uvloop.run(serve(args, settings, sock))
