"""The Prometheus and Alertmanager files are valid, and every alert is tested firing and silent."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.paths import PROMETHEUS, ROOT
from tests.deploy.tools import run

GROUPS = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
TESTS = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]


def cases(alert: str) -> list[dict[str, Any]]:
    return [case for test in TESTS for case in test.get("alert_rule_test", []) if case["alertname"] == alert]


def test_configurations_are_valid() -> None:
    for name, *arguments in (
        ("promtool", "check", "config", PROMETHEUS / "prometheus.yml"),
        ("amtool", "check-config", PROMETHEUS / "alertmanager.yml"),
    ):
        done = run(name, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rules_behave() -> None:
    done = run("promtool", "test", "rules", PROMETHEUS / "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_alert_is_tested_firing_and_silent(alert: str) -> None:
    assert any(case["exp_alerts"] for case in cases(alert))
    assert any(not case["exp_alerts"] for case in cases(alert))


def failing(expression: str, folder: Path) -> str:
    """What promtool says when every alert has this expression."""
    document = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    for rule in (rule for group in document["groups"] for rule in group["rules"] if "alert" in rule):
        rule["expr"] = expression
    (folder / "rules.yml").write_text(yaml.safe_dump(document))
    (folder / "rules_test.yml").write_text((PROMETHEUS / "rules_test.yml").read_text())
    done = run("promtool", "test", "rules", folder / "rules_test.yml")
    return done.stdout + done.stderr


@pytest.mark.parametrize(("expression", "expected"), [("vector(1) > 2", True), ("vector(1)", False)])
def test_an_alert_that_never_or_always_fires_is_noticed(expression: str, expected: bool, tmp_path: Path) -> None:
    # promtool prints each failed case as "alertname: NAME, time: ..., exp:[...], got:[...]"; "exp:[]" wants silence.
    found = re.findall(r"alertname: (\w+), time: \w+,\s+exp:\[(\]?)", failing(expression, tmp_path))
    noticed = {name for name, silence in found if bool(silence) is not expected}
    assert noticed == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_has_a_runbook_paragraph(rule: dict[str, Any]) -> None:
    assert rule["annotations"]["runbook_url"] == f"docs/use/operate.md#{rule['alert'].lower()}"
    sections = (ROOT / "docs" / "use" / "operate.md").read_text().split("\n## ")
    (paragraph,) = (s.partition("\n")[2] for s in sections if s.partition("\n")[0] == rule["alert"])
    assert f"({rule['labels']['severity']})" in paragraph
    assert len(paragraph.split()) > 20
