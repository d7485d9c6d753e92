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
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

import pruning
from pruning.checkpoint import Manifest, is_pruned, read_manifest
from server import vllm_compat
from server.admission import Admission
from server.auth import Authenticate, KeyRing
from server.inventory import Inventory, take_inventory
from server.lifecycle import Gate, Lifecycle, supervise
from server.metrics import Measure, publish
from server.settings import Settings

logger = logging.getLogger("shoal.app")


def assemble(
    stock: FastAPI, settings: Settings, lifecycle: Lifecycle, running: int, description: dict[str, Any]
) -> ASGIApp:
    """Add Shoal's routes to vLLM's application and put our middleware around it.

    vLLM hands the application over with its middleware stack already built, so ours wraps the whole: outermost the
    stop-watch, then the gate, the keys, the limits.

    Args:
        stock: vLLM's application.
        settings: How to serve.
        lifecycle: What the gate and the health routes read.
        running: Requests the engine runs at once.
        description: Answer of `/v1/pruning`.
    """

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse(description)

    stock.router.routes[:0] = [*lifecycle.routes(), Route("/v1/pruning", answer)]
    app: ASGIApp = Admission(
        stock, running, settings.max_queued_requests, settings.max_body_bytes, settings.retry_after_seconds
    )
    if settings.api_keys_file is not None:
        app = Authenticate(app, KeyRing(settings.api_keys_file))
    return Measure(Gate(app, lifecycle, settings.retry_after_seconds))


def describe(manifest: Manifest | None, inventory: Inventory) -> dict[str, Any]:
    """What `/v1/pruning` answers: the manifest and the numbers of the running engine."""
    return {
        "pruned": manifest is not None,
        "manifest": manifest.model_dump(exclude={"files", "digest"}) if manifest else None,
        "sublayers": list(inventory.blocks),
        "kv_cache": {
            "bytes_per_token": inventory.kv_bytes_per_token,
            "bytes_per_token_dense": inventory.kv_bytes_per_token_dense,
            "tokens": inventory.capacity_tokens,
            "tokens_dense": inventory.capacity_tokens_dense,
        },
        "weight_bytes": inventory.weight_bytes,
        "weight_bytes_dense": inventory.weight_bytes_dense,
    }


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
    vllm_compat.warn_if_untested()
    lifecycle = Lifecycle()
    directory = Path(args.model)
    manifest: Manifest | None = read_manifest(directory) if is_pruned(directory) else None
    async with vllm_compat.open_engine(args, client_config) as engine:
        facts = vllm_compat.engine_facts(engine)
        inventory = take_inventory(directory, manifest, facts)
        publish(inventory, pruning.__version__, vllm_compat.VERSION, args.served_model_name[0])
        stock = await vllm_compat.stock_app(engine, args)
        app = assemble(stock, settings, lifecycle, facts.max_running, describe(manifest, inventory))
        # vLLM's error handlers stop `state.server` at the first error of a dead engine; ours is stopped by `supervise`.
        stock.state.server = SimpleNamespace(should_exit=False)
        config = uvicorn.Config(
            app,
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
