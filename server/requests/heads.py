"""HEAD on every route that takes GET."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Heads:
    """Middleware: the application answers HEAD as if it were GET, and the body stays here.

    FastAPI's routes, unlike Starlette's, do not know HEAD.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, without the body."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, bodiless)
