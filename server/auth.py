"""API keys: read from a file, reloaded when it changes, compared in constant time."""

import hmac
import logging
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import SettingsError, error_response
from server.lifecycle import OPERATIONS

KEY = "shoal.key"  # where the scope has the Key of a request
OPEN = ("/",)  # the page itself; what it shows it asks for with a key
LIMITS = ("requests_per_minute", "tokens_per_minute")
logger = logging.getLogger("shoal.auth")


@dataclass(frozen=True, slots=True)
class Key:
    """One API key's owner.

    Attributes:
        name: What the key is called.
        requests_per_minute: Its own limit, None: the setting's.
        tokens_per_minute: The same for prompt and output tokens together.
    """

    name: str
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


def read_keys(path: Path) -> dict[bytes, Key]:
    """Keys of a file with lines `name:key [requests_per_minute=N] [tokens_per_minute=N]`.

    Blank lines and lines that start with # are skipped.

    Returns:
        Secret -> key.

    Raises:
        SettingsError: Unreadable, malformed or without any key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the API keys file {path}: {error}") from error
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        first, *options = line.split()
        name, colon, secret = first.partition(":")
        if not (name and colon and secret):
            raise SettingsError(f"{path}:{number}: expected name:key")
        keys[secret.encode()] = Key(name, **_limits(options, f"{path}:{number}"))
    if not keys:
        raise SettingsError(f"the API keys file {path} holds no key; add a line name:key")
    return keys


def _limits(options: list[str], where: str) -> dict[str, float]:
    limits: dict[str, float] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in LIMITS or not value.isdecimal() or int(value) == 0:
            raise SettingsError(f"{where}: expected {'=N or '.join(LIMITS)}=N with N above 0")
        limits[name] = float(value)
    return limits


class KeyRing:
    """The keys of a file that may change while the server runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = read_keys(path)
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except OSError:
            return (0, 0)
        return (stat.st_mtime_ns, stat.st_ino)

    def owner(self, secret: bytes) -> Key | None:
        """Key of a secret, None if unknown; every known one is compared, in constant time."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self.keys = read_keys(self.path)
                logger.info("read %d API keys again", len(self.keys))
            except SettingsError as error:
                logger.error("kept the old API keys: %s", error)
        found = None
        for known, key in self.keys.items():
            if hmac.compare_digest(known, secret):
                found = key
        return found


class Authenticate:
    """Middleware: refuses requests without a known key, except for health, metrics and the page."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self.app, self.ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request with a known bearer key (or `x-api-key`) pass, answer 401 to any other."""
        if scope["type"] not in ("http", "websocket") or self._open(scope):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        key = self.ring.owner(given.encode())
        if key is None:
            await error_response(401, "invalid_api_key", "a valid API key is needed")(scope, receive, send)
            return
        scope[KEY] = key  # in place: what the router notes in it is the metrics' label of the route
        await self.app(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in OPEN or path.startswith(OPERATIONS) or scope.get("method") == "OPTIONS"
