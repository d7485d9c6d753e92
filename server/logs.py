"""Log lines as text or JSON, each with the id of its request, and never a prompt."""

import logging
import logging.config
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
HEADER = "x-request-id"
# vLLM's own JSON lines have these fields too, so that one parser reads both.
FIELDS = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"
SAFE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
logger = logging.getLogger("shoal.access")


class AddRequestId(logging.Filter):
    """Gives every record the id of the request it was logged for, empty outside of one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add `request_id`; no record is held back."""
        record.request_id = REQUEST_ID.get()
        return True


def logging_config(level: str, style: Literal["text", "json"]) -> dict[str, Any]:
    """A `logging.config.dictConfig` for our lines and uvicorn's, on stderr.

    Args:
        level: Least severe level that is written.
        style: Lines for people, or one JSON object a line.
    """
    formatter = (
        {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": f"{FIELDS} %(request_id)s"}
        if style == "json"
        else {"format": "%(levelname)s %(asctime)s [%(name)s] %(message)s", "datefmt": "%m-%d %H:%M:%S"}
    )
    handler = {
        "class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "lines", "filters": ["request_id"],
    }  # fmt: skip
    ours = {"handlers": ["lines"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": AddRequestId}},
        "formatters": {"lines": formatter},
        "handlers": {"lines": handler},
        "loggers": {"shoal": ours, "uvicorn": ours},
    }


def configure(level: str, style: Literal["text", "json"]) -> None:
    """Set our loggers and uvicorn's up in this process, and add request ids to the lines of vLLM's handlers."""
    logging.config.dictConfig(logging_config(level, style))
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(AddRequestId())


class RequestLog:
    """Middleware: takes or makes `X-Request-Id`, sends it back, and writes one line for every request.

    The line has the method, the path without its query, the status and the seconds; no body is ever looked at.
    vLLM's ids of the same request end in this one (`chatcmpl-ID`).

    Args:
        app: What it wraps.
        quiet: Prefixes of paths that get no line, such as probes.
    """

    def __init__(self, app: ASGIApp, quiet: tuple[str, ...] = ()) -> None:
        self.app, self.quiet = app, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name, pass on, log."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        others = [(key, value) for key, value in scope["headers"] if key != HEADER.encode()]
        scope = {**scope, "headers": [*others, (HEADER.encode(), name.encode())]}
        REQUEST_ID.set(name)
        start, status = time.perf_counter(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            if not scope["path"].startswith(self.quiet):
                self._write(scope, status, time.perf_counter() - start)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        # `raw_path` is as the client sent it: no decoded line break can forge a line.
        path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace")
        logger.info(
            "%s %s %d %.3f s", scope["method"], path, status, seconds,
            extra={"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 6)},
        )  # fmt: skip
