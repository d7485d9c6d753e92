"""The page as a file: whole, offline, and allowed by its own policy."""

import base64
import hashlib
import re

from server.routes import page


def test_the_page_asks_nobody_but_this_server():
    html, headers = page()
    assert re.findall(r"""(?:src|href|url\(|@import|fetch\()\s*=?\s*["']?(?:https?:)?//""", html) == []
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "connect-src 'self'" in headers["Content-Security-Policy"]


def test_the_policy_lets_the_pages_own_script_and_style_run():
    html, headers = page()
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["Content-Security-Policy"]
    assert " style=" not in html
    assert "innerHTML" not in html
