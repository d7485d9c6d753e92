"""The application: vLLM's own with Shoal's routes and middleware around it, run to its end."""

import logging
import math
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

import pruning
from pruning.models.checkpoint import Manifest, is_pruned, read_manifest
from server import logs
from server.admission import Admission
from server.auth import Authenticate, KeyRing
from server.engine import compat
from server.engine.generation import TooManyTokens, guard_generation
from server.inventory import Inventory, take_inventory
from server.lifecycle import OPERATIONS, Gate, Lifecycle, Split, supervise
from server.limits import RateLimit, spend_tokens
from server.metrics import Measure, publish
from server.opening import opening, opening_app
from server.requests.costs import Limits
from server.requests.heads import Heads
from server.requests.refusals import OpenAIErrors
from server.requests.tokens import TokenQueue, refuse_tokens, reserve
from server.requests.validation import UNREADABLE, refuse_invalid, refuse_unreadable
from server.routes import router
from server.settings import Settings
from server.starting import interruptible

logger = logging.getLogger("shoal.app")


def dress(app: ASGIApp, cors: dict[str, Any], root: int | None = None) -> ASGIApp:
    """Put around an application what every answer of the process gets: log and id, times, CORS, OpenAI's errors.

    Args:
        app: With its gate.
        cors: Options of Starlette's middleware.
        root: Process whose memory is reported; None: this one.
    """
    allowed = CORSMiddleware(app, expose_headers=["X-Request-Id", "Retry-After"], **cors)
    return logs.RequestLog(Heads(Measure(OpenAIErrors(allowed), root)), quiet=OPERATIONS)


def assemble(
    stock: FastAPI, settings: Settings, lifecycle: Lifecycle, running: int, held: int, processes: int = 1,
    *, scores_prompts: bool = True,
) -> ASGIApp:  # fmt: skip
    """Put our middleware around vLLM's application.

    Its middleware stack stays vLLM's, so ours wraps the whole: the gate, then the keys, their limits, the limits of
    all. What `dress` puts on is outside of that.

    Args:
        stock: vLLM's application, with our routes in it.
        settings: How to serve.
        lifecycle: What the gate and the health routes read.
        running: Sequences the engine runs at once.
        held: Tokens its KV cache holds.
        processes: API processes that share the traffic; each hands out its part of the limits.
        scores_prompts: Whether the engine can give log-probabilities of prompts.
    """
    limits = Limits(**{field.name: getattr(settings, f"max_{field.name}") for field in fields(Limits)})
    waiting, tokens = (
        None if limit is None else math.ceil(limit / processes)
        for limit in (settings.max_queued_requests, settings.max_queued_tokens)
    )
    app: ASGIApp = Admission(
        stock,
        math.ceil(running / processes),
        waiting,
        settings.max_body_bytes,
        settings.retry_after_seconds,
        limits if scores_prompts else replace(limits, prompt_logprobs=None),
        TokenQueue(held // processes, tokens),
        stores=compat.stores_responses(),
    )
    if settings.api_keys_file is not None:
        app = RateLimit(app, settings.requests_per_minute, settings.tokens_per_minute, 1 / processes)
        app = Authenticate(app, KeyRing(settings.api_keys_file))
    return Gate(app, lifecycle, settings.retry_after_seconds)


def adopt(stock: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Make vLLM's application ours: routes that come first, its name, and sentences for what is wrong with a field."""
    stock.router.routes[:0] = routes
    stock.title, stock.version = "Shoal", pruning.__version__
    stock.description = "OpenAI-compatible API of a depth-pruned model, served by vLLM."
    stock.add_exception_handler(RequestValidationError, refuse_invalid)
    stock.add_exception_handler(TooManyTokens, refuse_tokens)
    for kind in UNREADABLE:
        stock.add_exception_handler(kind, refuse_unreadable)
    stock.user_middleware = [one for one in stock.user_middleware if one.cls is not CORSMiddleware]  # `dress` has it
    stock.middleware_stack = None  # built at the first request, with these handlers in it


def announce(inventory: Inventory, args: Namespace, settings: Settings) -> None:
    """Say what the cache holds and which parsers read the answers, and to people a line to try."""
    tools, reasoning = compat.parsers(args)
    lines = [*inventory.lines(), f"Parsers: tool calls {tools or 'none'}, reasoning {reasoning or 'none'}"]
    for warning in inventory.warnings:
        logger.warning(warning)
    if settings.log_format == "json":
        for line in lines:
            logger.info(line)
        return
    scheme = "https" if args.ssl_certfile else "http"
    host = "localhost" if args.host in ("0.0.0.0", "::", None, "") else args.host
    print(*lines, sep="\n")
    print(
        f"Try: curl {scheme}://{host}:{args.port}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{args.served_model_name[0]}", "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}\'',
        flush=True,
    )


async def serve(
    args: Namespace, settings: Settings, sockets: Sequence[socket.socket], client_config: dict[str, Any] | None = None
) -> int:
    """Start the engine, serve until the end, and return the exit code.

    Args:
        args: vLLM's arguments.
        settings: How to serve.
        sockets: Bound: the API's and, where it has its own, the one for operations.
        client_config: How this process joins the engines, one of several API processes; None: it is alone.
    """
    compat.warn_if_untested()
    lifecycle = Lifecycle()
    directory = Path(args.model)
    manifest: Manifest | None = read_manifest(directory) if is_pruned(directory) else None
    draft: Manifest | None = read_manifest(settings.draft) if settings.draft else None
    processes, root, first = 1, None, True
    if client_config is not None:
        processes, root, first = client_config["client_count"], os.getppid(), client_config["client_index"] == 0
    peer_loads = compat.peer_loads(client_config)
    options = compat.uvicorn_options(args) | {"access_log": False, "log_config": None}
    cors = compat.take_cors(args)
    waiting_room = opening_app(lifecycle, compat.metrics_registry(), settings.retry_after_seconds)
    async with AsyncExitStack() as stack:
        alone = client_config is None  # else vLLM's parent of all API processes hears the signals
        ends = interruptible() if alone else nullcontext()
        with ends, opening(dress(waiting_room, cors, root), sockets, options):
            engine = await stack.enter_async_context(compat.open_engine(args, client_config))
            facts = compat.engine_facts(engine)
            inventory = take_inventory(directory, manifest, facts, draft)
            publish(inventory, pruning.__version__, compat.VERSION, args.served_model_name[0])
            guard_generation(engine, settings.max_prompt_tokens, settings.max_output_tokens, spend_tokens, reserve)
            stock = await compat.stock_app(engine, args)
            own = router(manifest, inventory, partial(compat.model_cards, stock), draft, compat.VERSION)
            adopt(stock, [*lifecycle.routes(), *own.routes])
            # vLLM's error handlers stop `state.server` at the first error of a dead engine; `supervise` stops ours.
            stock.state.server = SimpleNamespace(should_exit=False)
            app = assemble(
                stock, settings, lifecycle, facts.max_running, facts.capacity_tokens, processes,
                scores_prompts=compat.scores_prompts(args),
            )  # fmt: skip
        apps: list[ASGIApp] = [app] if len(sockets) == 1 else [Split(app, False), Split(app, True)]
        servers = []
        for part, sock in zip(apps, sockets, strict=True):
            main = sock is sockets[0]
            lifespan: Literal["on", "off"] = "on" if main else "off"
            config = uvicorn.Config(dress(part, cors, root), lifespan=lifespan, timeout_graceful_shutdown=2, **options)
            config.load()
            stack.callback(compat.refresh_certificates(config, args))
            servers.append((compat.http_server(config, peer_loads if main else None), [sock]))
        ready = partial(announce, inventory, args, settings) if first else lambda: None
        dead = compat.death_watch(engine, root)
        return await supervise(lifecycle, servers, engine, dead, settings.grace_seconds, ready)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def api_process(
    address: str, sock: socket.socket, args: Namespace, client_config: dict[str, Any] | None = None, **_: Any
) -> None:
    """One of several API processes: what vLLM starts in place of its own worker."""
    compat.enter_api_process(args, client_config)
    settings: Settings = args.shoal_settings
    logs.configure(settings.log_level, settings.log_format)
    sys.exit(uvloop.run(serve(args, settings, [sock, *args.shoal_sockets], client_config)))


def run(args: Namespace, settings: Settings) -> int:
    """Serve in this process, or in `--api-server-count` processes of its own, and return the exit code."""
    logs.configure(settings.log_level, settings.log_format)
    operations = settings.operations_port
    with ExitStack() as stack:
        extra = [] if operations is None else [stack.enter_context(compat.bind(args.host or "", operations))]
        if (args.api_server_count or 1) > 1:
            args.shoal_settings, args.shoal_sockets = settings, extra
            return compat.run_api_processes(args, api_process)
        signal.signal(signal.SIGTERM, _interrupt)  # until the event loop takes it over
        return uvloop.run(serve(args, settings, [stack.enter_context(compat.listen(args)), *extra]))
