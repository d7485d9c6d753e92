"""Answers while the engine loads: a probe gets 503 and `starting` at once, not silence."""

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from server.lifecycle import Gate, Lifecycle


def opening_app(lifecycle: Lifecycle, registry: CollectorRegistry, retry_after_seconds: float) -> Gate:
    """Health and metrics; 503 with Retry-After for the rest.

    Args:
        lifecycle: In its starting phase.
        registry: What `/metrics` shows.
        retry_after_seconds: For the 503.
    """

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(routes=[*lifecycle.routes(), Route("/metrics", metrics)])
    return Gate(app, lifecycle, retry_after_seconds)


@contextmanager
def opening(app: ASGIApp, sockets: Sequence[socket.socket], options: dict[str, Any]) -> Iterator[None]:
    """Serve an application in a thread until the block ends; the sockets stay open and keep what waits in them.

    vLLM's start blocks the event loop it runs in, so this has a loop of its own. What it listens on are duplicates of
    the descriptors: connections that arrive while it hands over wait in the kernel's queue for the next server.

    Args:
        app: What answers.
        sockets: Bound.
        options: Of `uvicorn.Config`.
    """
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", **options))
    copies = [sock.dup() for sock in sockets]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=copies)), name="opening", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
