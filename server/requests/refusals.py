"""Every answer that is no success has OpenAI's error object, whoever gave it: the framework, vLLM, or a crash."""

import json
import logging
import re
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response, error_type

FAILED = "the server failed at this request"
FRAMEWORK = ("Not Found", "Method Not Allowed")  # what Starlette says, which says nothing
logger = logging.getLogger("shoal.refusals")
PARAMETER = re.compile(r" \(parameter=[^()]*\)$")  # what vLLM adds for itself; `param` has it


class OpenAIErrors:
    """Middleware: gives answers of status 400 and above the body that OpenAI's clients read.

    A stream that breaks after it has begun ends with an error as its last event.

    Bodies that are something else on purpose stay as they are: those of the health routes, and Anthropic's errors.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; hold an error back until it is whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""
        sent, streams, pieces = False, False, 0

        async def watched(message: Message) -> None:
            nonlocal start, body, sent, streams, pieces
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    start = message
                    return
                streams = any(k == b"content-type" and b"event-stream" in v for k, v in message["headers"])
            if start is None:
                sent, pieces = True, pieces + bool(message.get("body"))
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                content = _content(scope, start, body)
                if content != body:
                    headers = MutableHeaders(scope=start)
                    headers["content-type"], headers["content-length"] = "application/json", str(len(content))
                sent = True
                await send(start)
                await send({"type": "http.response.body", "body": content})

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if not sent:
                await error_response(500, None, FAILED)(scope, receive, send)
            elif streams:
                event, is_clients = _last_event(error, pieces)
                await send({"type": "http.response.body", "body": event})
                if is_clients:
                    logger.info("a stream ended with an error of its request")  # whose text may quote it
                    return
            raise


def _last_event(error: Exception, number: int) -> tuple[bytes, bool]:
    """What ends a stream that broke after it had begun, and whether its request was at fault.

    vLLM checks some fields when it has already answered 200; its exceptions for them have a `parameter`. Those that
    refuse for want of room have an `http_status`.

    Args:
        error: Starlette's, with vLLM's as its cause, or any other.
        number: Of this event in the stream.
    """
    cause = error if hasattr(error, "http_status") else error.__cause__ or error
    status = 400 if hasattr(cause, "parameter") else int(getattr(cause, "http_status", 500))
    is_clients = status < 500
    message = PARAMETER.sub("", str(cause)) if status != 500 else FAILED
    told = {"message": message, "type": error_type(status),
            "param": getattr(cause, "parameter", None), "code": None}  # fmt: skip
    # `error` is for chat and completions, the rest for the event of that name of responses.
    event = {"type": "error", "error": told, "sequence_number": number} | {
        k: told[k] for k in ("message", "param", "code")
    }
    return f"event: error\ndata: {json.dumps(event)}\n\n".encode(), is_clients


def _content(scope: Scope, start: Message, body: bytes) -> bytes:
    """What the client gets for a body."""
    status = start["status"]
    try:
        said = json.loads(body) if body else None
    except ValueError:
        said = body.decode("utf-8", "replace") if len(body) < 200 else None
    if isinstance(said, dict):
        error = said.get("error", said.get("detail"))
        if error is None or (isinstance(error, dict) and said.get("type") == "error"):
            return body
        said = error
    error = said if isinstance(said, dict) else {"message": said}
    code = error.get("code")
    if not isinstance(code, str):  # vLLM puts the status there
        code = "model_not_found" if status == 404 and error.get("param") == "model" else None
    message = _message(scope, start, error.get("message"))
    told = {"message": message, "type": error_type(status), "param": error.get("param"), "code": code}
    return json.dumps({"error": told}).encode()


def _message(scope: Scope, start: Message, said: Any) -> str:
    if isinstance(said, str) and said and said not in FRAMEWORK:
        return PARAMETER.sub("", said)
    path, method, status = scope["path"][:200], scope["method"], start["status"]
    if status == 404:
        return f"there is no {path} here"
    if status == 405:
        allowed = MutableHeaders(scope=start).get("allow", "")
        return f"{path} does not take {method}" + (f"; it takes {allowed}" if allowed else "")
    return HTTPStatus(status).phrase.lower() if status in set(HTTPStatus) else "the request failed"
