"""API keys: read from a file, reloaded when it changes, compared in constant time."""

import hmac
import logging
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import SettingsError, error_response
from server.lifecycle import OPERATIONS

logger = logging.getLogger("shoal.auth")


def read_keys(path: Path) -> dict[bytes, str]:
    """Keys of a file with `name:key` lines; blank lines and lines that start with # are skipped.

    Returns:
        Key -> name.

    Raises:
        SettingsError: Unreadable, malformed or without any key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the API keys file {path}: {error}") from error
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, key = line.strip().partition(":")
        if not (name and colon and key):
            raise SettingsError(f"{path}:{number}: expected name:key")
        keys[key.encode()] = name
    if not keys:
        raise SettingsError(f"the API keys file {path} holds no key; add a line name:key")
    return keys


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

    def name_of(self, key: bytes) -> str | None:
        """Name of a key, None if unknown; every known key is compared, in constant time."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self.keys = read_keys(self.path)
                logger.info("read %d API keys again", len(self.keys))
            except SettingsError as error:
                logger.error("kept the old API keys: %s", error)
        found = None
        for known, name in self.keys.items():
            if hmac.compare_digest(known, key):
                found = name
        return found


class Authenticate:
    """Middleware: refuses requests without a known key, except for health and metrics."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self.app, self.ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request with a known bearer key (or `x-api-key`) pass, answer 401 to any other."""
        open_to_all = scope["type"] != "http" or scope["path"].startswith(OPERATIONS) or scope["method"] == "OPTIONS"
        if not open_to_all:
            headers = Headers(scope=scope)
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if self.ring.name_of(given.encode()) is None:
                await error_response(401, "invalid_api_key", "a valid API key is needed")(scope, receive, send)
                return
        await self.app(scope, receive, send)
