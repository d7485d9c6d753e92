"""The dashboard is what its generator writes; its queries parse and ask for metrics that exist."""

import importlib.util
import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.paths import DEPLOY, HERE, PROMETHEUS, ROOT

SPEC = importlib.util.spec_from_file_location("dashboard", DEPLOY / "grafana" / "dashboard.py")
assert SPEC is not None
assert SPEC.loader is not None
dashboard = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dashboard)

RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in dashboard.dashboard()["panels"] if panel["type"] != "row"]
EXPRESSIONS = {target["expr"] for panel in PANELS for target in panel["targets"]} | {rule["expr"] for rule in RULES}


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$instance", ".*"))


def selectors(node: Any) -> Iterator[str]:
    """Names of the series an expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for attribute in ("expr", "lhs", "rhs", "vector_selector"):
        child = getattr(node, attribute, None)
        if child is not None and not isinstance(child, str):
            yield from selectors(child)
    for argument in getattr(node, "args", None) or []:
        yield from selectors(argument)


def known() -> set[str]:
    """Series of our own metrics table, of a scrape of a real server, and of the recording rules."""
    documented = set(re.findall(r"^\| `(shoal_\w+)`", (ROOT / "docs" / "use" / "metrics.md").read_text(), re.MULTILINE))
    scraped = set((HERE / "scraped_names.txt").read_text().split())
    # Without samples on a machine that has no GPU and has turned nobody away.
    silent = {"shoal_admission_rejected_total", "shoal_device_memory_bytes"}
    assert documented - silent <= {re.sub("_(bucket|sum|count)$", "", n) for n in scraped}
    return documented | scraped | {rule["record"] for rule in RULES if "record" in rule} | {"up"}


def test_the_file_is_what_the_generator_writes() -> None:
    assert (DEPLOY / "grafana" / "shoal.json").read_text() == dashboard.text()


@pytest.mark.parametrize("expression", sorted(EXPRESSIONS))
def test_expression_parses_and_its_metrics_exist(expression: str) -> None:
    names = set(selectors(parsed(expression)))
    assert names
    assert names <= known()


def test_a_planted_fault_is_found() -> None:
    with pytest.raises(ValueError, match=r".+"):
        parsed("sum by (le (rate(up[5m]))")
    assert set(selectors(parsed("sum(rate(shoal_reddy[5m])) / count(up)"))) - known() == {"shoal_reddy"}


def test_panels_have_places_and_names_of_their_own() -> None:
    document = json.loads((DEPLOY / "grafana" / "shoal.json").read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in document["panels"]]
    assert len({p["id"] for p in document["panels"]}) == len(document["panels"]) == len(set(places))
    assert len({p["title"] for p in document["panels"]}) == len(document["panels"])
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in document["panels"])
