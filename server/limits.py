"""Rate limits of API keys: token buckets for requests and for prompt and output tokens."""

import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import KEY, Key
from server.errors import error_response
from server.metrics import REJECTED

MINUTE = 60.0


@dataclass(slots=True)
class Bucket:
    """Holds up to a minute's worth and fills evenly; may be overdrawn by what was not known beforehand.

    Attributes:
        per_minute: Units that flow in each minute, and the most it holds; None: without limit.
        level: Units in it at `seen`; below 0 is debt.
        seen: Time of the last change, in seconds.
    """

    per_minute: float | None
    level: float
    seen: float

    def wait(self, now: float, units: float) -> float:
        """Seconds until `units` are in it, 0 if they are now."""
        if self.per_minute is None:
            return 0.0
        self.level = min(self.per_minute, self.level + (now - self.seen) * self.per_minute / MINUTE)
        self.seen = now
        return max(0.0, (min(units, self.per_minute) - self.level) * MINUTE / self.per_minute)

    def take(self, units: float) -> None:
        """Draw `units`, into debt if they are not there."""
        if self.per_minute is not None:
            self.level -= units

    def resize(self, per_minute: float | None) -> None:
        """Take over another limit, as when the keys file changed."""
        if per_minute != self.per_minute:
            self.per_minute, self.level = per_minute, math.inf if per_minute is None else per_minute


@dataclass(frozen=True, slots=True)
class Account:
    """Buckets of one key."""

    requests: Bucket
    tokens: Bucket


ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)


def spend_tokens() -> Callable[[int], None] | None:
    """How to charge the current request's key for tokens; None where tokens are not limited."""
    account = ACCOUNT.get()
    return None if account is None or account.tokens.per_minute is None else account.tokens.take


class RateLimit:
    """Middleware after the keys: 429 with Retry-After for a key over its requests or tokens a minute.

    What a request will cost in tokens is not known when it comes, so it is let in while any are left, and what it took
    is drawn afterwards: a key may overdraw by its running requests and then waits until the debt has flowed off.

    Args:
        app: What it guards.
        requests_per_minute: Limit of a key whose line in the file names none; None: no limit.
        tokens_per_minute: The same for prompt and output tokens together.
        share: Part of each limit that this process may hand out, when several share the traffic.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        app: ASGIApp,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.clock, self.share = app, clock, share
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.accounts: dict[str, Account] = {}

    def account(self, key: Key) -> Account:
        """Buckets of a key, full at first sight; the same name keeps its buckets when its secret is changed."""
        limits = [
            None if limit is None else limit * self.share
            for limit in (
                key.requests_per_minute or self.requests_per_minute,
                key.tokens_per_minute or self.tokens_per_minute,
            )
        ]
        if key.name not in self.accounts:
            now = self.clock()
            self.accounts[key.name] = Account(*(Bucket(limit, limit or 0.0, now) for limit in limits))
        account = self.accounts[key.name]
        account.requests.resize(limits[0])
        account.tokens.resize(limits[1])
        return account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on with the account in place."""
        key: Key | None = scope.get(KEY)
        if key is None or scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        account, now = self.account(key), self.clock()
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if (seconds := bucket.wait(now, 1.0)) > 0:
                REJECTED.labels(f"{name}_per_minute").inc()
                text = f"the API key's limit of {bucket.per_minute:g} {name} per minute is used up"
                await error_response(429, "rate_limit_exceeded", text, retry_after=seconds)(scope, receive, send)
                return
        account.requests.take(1.0)
        ACCOUNT.set(account)
        await self.app(scope, receive, send)
