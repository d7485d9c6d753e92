"""What Prometheus and Alertmanager on this machine know: for the checks that bring them up."""

import json
import time
import urllib.parse
import urllib.request
from typing import Any

PROMETHEUS, ALERTMANAGER = "http://127.0.0.1:9090", "http://127.0.0.1:9093"


def fetch(url: str) -> Any:
    """JSON (or text) of a GET, None when nobody answers or it is refused."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    return json.loads(text) if text[:1] in "[{" else text


def wait_for(url: str, seconds: float = 300) -> float:
    """Seconds until a URL answers 200."""
    begun = time.monotonic()
    while fetch(url) is None:
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{url} does not answer")
        time.sleep(0.5)
    return round(time.monotonic() - begun, 1)


def query(expression: str) -> list[dict[str, Any]]:
    """Series of an instant query; none when Prometheus does not answer."""
    answer = fetch(f"{PROMETHEUS}/api/v1/query?query={urllib.parse.quote(expression)}")
    return list(answer["data"]["result"]) if answer else []


def series(*selectors: str) -> dict[str, int]:
    """Number of series of the job `shoal` that each selector finds now."""
    found = {selector: query(f'count({{__name__=~"{selector}",job="shoal"}})') for selector in selectors}
    return {selector: int(result[0]["value"][1]) if result else 0 for selector, result in found.items()}


def alert_arrives(name: str, seconds: float) -> dict[str, Any] | None:
    """Wait until Alertmanager holds an alert; its labels, its receivers and how long it took."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        for alert in fetch(f"{ALERTMANAGER}/api/v2/alerts?active=true") or []:
            if alert["labels"]["alertname"] == name:
                receivers = [receiver["name"] for receiver in alert["receivers"]]
                took = round(time.monotonic() - begun, 1)
                return {"labels": alert["labels"], "receivers": receivers, "seconds": took}
        time.sleep(1)
    return None


def alert_ends(name: str, seconds: float) -> bool:
    """Wait until no such alert is active at Alertmanager."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        active = fetch(f"{ALERTMANAGER}/api/v2/alerts?active=true")
        if active is not None and all(alert["labels"]["alertname"] != name for alert in active):
            return True
        time.sleep(1)
    return False
