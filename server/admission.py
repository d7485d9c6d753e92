"""Limits at the door: how many requests may wait, and how large a body may be."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response, whole_seconds
from server.metrics import ACCEPTED, QUEUE_DEPTH, REJECTED


class Admission:
    """Middleware around the routes that generate: a full house is answered at once, with Retry-After.

    Args:
        app: What it guards.
        running: Requests the engine runs at once.
        waiting: Requests that may wait beyond those; None: any number.
        body_bytes: Bytes of the largest body.
        retry_after_seconds: For the 503 of a full queue, and for a 429 or 503 of the application that names no time.
    """

    def __init__(
        self, app: ASGIApp, running: int, waiting: int | None, body_bytes: int, retry_after_seconds: float
    ) -> None:
        self.app = app
        self.running, self.waiting = running, waiting
        self.body_bytes, self.retry_after = body_bytes, retry_after_seconds
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count, refuse or pass on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self.body_bytes:
            await self._too_large(scope, receive, send)
            return
        if self.waiting is not None and self.inside >= self.running + self.waiting:
            REJECTED.labels("queue_full").inc()
            text = f"{self.inside} requests are running or waiting; try again later"
            await error_response(503, "queue_full", text, retry_after=self.retry_after)(scope, receive, send)
            return
        ACCEPTED.inc()
        self._enter(+1)
        started = over = False
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived, over
            message = await receive()
            arrived += len(message.get("body", b""))
            over = over or arrived > self.body_bytes
            return {"type": "http.disconnect"} if over else message

        async def noted(message: Message) -> None:
            nonlocal started
            if over:  # what the application says to a body cut short is of no interest
                return
            started = True
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                MutableHeaders(scope=message).setdefault("retry-after", whole_seconds(self.retry_after))
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except ClientDisconnect:
            if not over:
                raise
        finally:
            self._enter(-1)
        if over and not started:
            await self._too_large(scope, receive, send)

    def _enter(self, step: int) -> None:
        self.inside += step
        QUEUE_DEPTH.set(max(0, self.inside - self.running))

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        REJECTED.labels("body_too_large").inc()
        text = f"the body has more than {self.body_bytes} bytes"
        await error_response(413, "body_too_large", text, retry=False)(scope, receive, send)
