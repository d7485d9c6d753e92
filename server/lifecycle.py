"""Starting, ready, draining, dead: what the health routes say, and how the process ends."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine import compat
from server.errors import error_response
from server.metrics import READY

OPERATIONS = ("/health", "/metrics", "/ping", "/version", "/load")
POLL_SECONDS = 0.1
DEATH_SECONDS = 3.0
logger = logging.getLogger("shoal.lifecycle")


class Phase(StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Lifecycle:
    """The phase, and the number of requests in flight."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.started = False
        self.open_requests = 0

    def become(self, phase: Phase) -> None:
        """Enter a phase."""
        logger.info("%s", phase.value)
        self.phase = phase
        self.started = self.started or phase is Phase.READY
        READY.set(phase is Phase.READY)

    async def idle(self, seconds: float, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until no request is in flight; False when `seconds` passed or `unless()` came true first."""
        deadline = time.monotonic() + seconds
        while self.open_requests:
            if time.monotonic() > deadline or unless():
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    def routes(self) -> list[Route]:
        """The health routes."""
        return [
            Route("/health/startup", self._answer(lambda: self.started)),
            Route("/health/live", self._answer(lambda: self.phase is not Phase.DEAD)),
            Route("/health/ready", self._answer(lambda: self.phase is Phase.READY)),
        ]

    def _answer(self, truth: Any) -> Any:
        async def health(request: Request) -> JSONResponse:
            return JSONResponse({"status": self.phase.value}, 200 if truth() else 503)

        return health


class Gate:
    """Middleware: counts requests in flight and refuses new ones while the server is not ready."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, retry_after_seconds: float) -> None:
        self.app, self.lifecycle, self.retry_after = app, lifecycle, retry_after_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass operations on, count the rest."""
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith(OPERATIONS):
            await self.app(scope, receive, send)
            return
        life = self.lifecycle
        if life.phase is not Phase.READY:
            refusal = error_response(
                503, life.phase.value, f"the server is {life.phase.value}", retry_after=self.retry_after
            )
            await refusal(scope, receive, send)
            return
        life.open_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            life.open_requests -= 1


class Split:
    """Middleware: health and metrics on a port of their own.

    Args:
        app: What it guards.
        operations: True: nothing but health and metrics here; False: all but those; else 404.
    """

    def __init__(self, app: ASGIApp, operations: bool) -> None:
        self.app, self.operations = app, operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what belongs to this port."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPERATIONS) == self.operations:
            await self.app(scope, receive, send)
            return
        where = "the API's port" if self.operations else "the operations port"
        refusal = error_response(404, "wrong_port", f"there is no {scope['path']} on this port; ask {where}")
        await refusal(scope, receive, send)


async def supervise(
    lifecycle: Lifecycle,
    servers: list[Any],
    engine: Any,
    dead: Callable[[], bool],
    grace_seconds: float,
    ready: Callable[[], None],
) -> int:
    """Run HTTP servers until a signal or the engine's death.

    Args:
        lifecycle: What the health routes and the gate read.
        servers: (uvicorn server, sockets) pairs.
        engine: vLLM's engine client.
        dead: Whether the engine is.
        grace_seconds: For requests in flight after SIGTERM or SIGINT; a further SIGINT ends it.
        ready: Called once the first token was generated.

    Returns:
        Exit code: 0 drained, 1 the engine died.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    hurry = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: hurry.set() if stop.is_set() else stop.set())
    running = [asyncio.create_task(server.serve(sockets=sockets)) for server, sockets in servers]
    warm_up = asyncio.create_task(compat.first_token(engine))
    try:
        while not stop.is_set() and not dead() and not any(task.done() for task in running):
            if warm_up.done() and not lifecycle.started and warm_up.exception() is None:
                lifecycle.become(Phase.READY)
                ready()
            await asyncio.sleep(POLL_SECONDS)
        if stop.is_set():
            lifecycle.become(Phase.DRAINING)
            if not await lifecycle.idle(grace_seconds, lambda: dead() or hurry.is_set()) and not dead():
                logger.warning("%d requests were cut off after the grace period", lifecycle.open_requests)
        if dead():
            lifecycle.become(Phase.DEAD)
            await lifecycle.idle(DEATH_SECONDS)
        return 1 if lifecycle.phase is Phase.DEAD or not stop.is_set() else 0
    finally:
        for server, _ in servers:
            server.should_exit = True
        warm_up.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await loop.run_in_executor(None, compat.shut_down, engine, DEATH_SECONDS)
