"""Limits at the door: how large a body may be, what a request may ask for, how many sequences and tokens may wait."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Refusal, error_response, whole_seconds
from server.metrics import ACCEPTED, QUEUE_DEPTH, REJECTED
from server.requests import body, costs, fields
from server.requests.tokens import TokenQueue


class Admission:
    """Middleware around the routes that generate: what is too much is answered at once, before the engine hears of it.

    The body is read whole first. A request counts as many times as it asks for sequences (`n` times its prompts). One
    that alone fills the house still gets into an empty one. How many tokens it asks for is known when its prompt has
    been read, so `tokens` refuses later, but before anything is computed.

    Args:
        app: What it guards.
        running: Sequences the engine runs at once.
        waiting: Sequences that may wait beyond those; None: any number.
        body_bytes: Bytes of the largest body.
        retry_after_seconds: For the 503 of a full queue, and for a 429 or 503 of the application that names no time.
        limits: What one request may ask for; None: anything.
        tokens: Counts the tokens asked for; None: they are not counted.
        stores: Whether the application keeps responses, which some fields are about.
    """

    def __init__(
        self,
        app: ASGIApp,
        running: int,
        waiting: int | None,
        body_bytes: int,
        retry_after_seconds: float,
        limits: costs.Limits | None = None,
        tokens: TokenQueue | None = None,
        *,
        stores: bool = False,
    ) -> None:
        self.app = app
        self.running, self.waiting = running, waiting
        self.body_bytes, self.retry_after = body_bytes, retry_after_seconds
        self.limits, self.stores = limits, stores
        self.tokens = tokens or TokenQueue(0, None)
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, count, refuse or pass on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self._full(1):
            await self._turn_away(scope, receive, send)
            return
        weight = 1
        self._enter(weight)
        try:
            content = await self._read(scope, receive)
            if content is None:
                return
            sequences, bounded = self._weigh(scope, content)
            more = sequences - weight
            if more and self._full(more, besides=weight):
                await self._turn_away(scope, receive, send)
                return
            weight += more
            self._enter(more)
            ACCEPTED.inc()
            with self.tokens.request(bounded=bounded):
                await self.app(scope, _again(content, receive), self._with_retry_after(send))
        except Refusal as refusal:
            await self._refuse(refusal)(scope, receive, send)
        finally:
            self._enter(-weight)

    def _full(self, more: int, besides: int = 0) -> bool:
        """Whether there is no room for more; `besides` is what the asking request already takes."""
        others = self.inside - besides
        return self.waiting is not None and others > 0 and self.inside + more > self.running + self.waiting

    def _enter(self, step: int) -> None:
        self.inside += step
        QUEUE_DEPTH.set(max(0, self.inside - self.running))

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away."""
        headers = Headers(scope=scope)
        body.check_encoding(headers.get("content-encoding", ""))
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        arrived, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            arrived += len(parts[-1])
            if arrived > self.body_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(parts)

    def _weigh(self, scope: Scope, content: bytes) -> tuple[int, bool]:
        """How many sequences a body asks for, and whether it bounds them; what is no JSON the application judges."""
        if not content or not body.is_json(Headers(scope=scope).get("content-type", "")):
            return 1, False
        value = body.parse(content)
        fields.check(scope["path"], value, stores=self.stores)
        if self.limits is not None:
            costs.check(value, len(content), self.limits)
        return costs.sequences(value), costs.bounds_answer(value)

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_too_large", f"the body has more than {self.body_bytes} bytes")

    def _refuse(self, refusal: Refusal) -> ASGIApp:
        if refusal.code in ("body_too_large", "over_limit"):
            REJECTED.labels(refusal.code).inc()
        return error_response(refusal.status, refusal.code, refusal.text, param=refusal.param, retry=False)

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        REJECTED.labels("queue_full").inc()
        text = f"{self.inside} sequences are running or waiting; try again later"
        await error_response(503, "queue_full", text, retry_after=self.retry_after)(scope, receive, send)

    def _with_retry_after(self, send: Send) -> Send:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                MutableHeaders(scope=message).setdefault("retry-after", whole_seconds(self.retry_after))
            await send(message)

        return noted


def _again(content: bytes, receive: Receive) -> Receive:
    """Hands the body out once more, then what else comes from the client."""
    handed = False

    async def replay() -> Message:
        nonlocal handed
        if handed:
            return await receive()
        handed = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay
