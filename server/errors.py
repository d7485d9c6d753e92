"""What can go wrong while serving: errors of the command line and the bodies an OpenAI client understands.

UserError (pruning)  exit 2
└── SettingsError        a Shoal setting or a vLLM argument
ShoalError (pruning) exit 1
└── EngineError          the engine did not start, or died
"""

import math

from starlette.responses import JSONResponse

from pruning.errors import ShoalError, UserError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_type(status: int) -> str:
    """OpenAI's `type` of an error with this status."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


class SettingsError(UserError):
    """A setting, a flag or a vLLM argument is wrong; nothing was started."""


class EngineError(ShoalError):
    """The engine did not start or died."""


class Refusal(Exception):
    """A request is refused: what `error_response` makes an answer of.

    Attributes:
        status: HTTP status.
        code: Machine-readable reason.
        text: One sentence for people.
        param: Field of the request that is wrong, None: no single one.
    """

    def __init__(self, status: int, code: str, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code, self.text, self.param = status, code, text, param

    def response(self) -> JSONResponse:
        """Its answer."""
        return error_response(self.status, self.code, self.text, param=self.param)


def whole_seconds(seconds: float) -> str:
    """Value of a Retry-After header: rounded up, at least 1."""
    return str(max(1, math.ceil(seconds)))


def error_response(
    status: int,
    code: str | None,
    message: str,
    *,
    param: str | None = None,
    retry_after: float | None = None,
    retry: bool = True,
) -> JSONResponse:
    """An OpenAI error body as an ASGI application.

    Args:
        status: HTTP status.
        code: Machine-readable reason, such as `queue_full`.
        message: One sentence for people.
        param: Field of the request that is wrong.
        retry_after: Seconds after which to try again; rounded up to whole seconds.
        retry: False tells OpenAI's clients not to send the same request again.
    """
    headers = {}
    if retry_after is not None:
        headers["Retry-After"] = whole_seconds(retry_after)
    if not retry:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}
    return JSONResponse(body, status, headers)
