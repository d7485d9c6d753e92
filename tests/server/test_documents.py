"""The documents list what the code has."""

from pathlib import Path

import server.metrics as metrics
from server.requests.fields import table as fields_table
from server.settings import table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_table_is_the_settings():
    assert table() in (DOCS / "use" / "serve.md").read_text()


def test_every_metric_is_documented_and_every_documented_metric_exists():
    import re

    instruments = [v for v in vars(metrics).values() if hasattr(v, "_documentation")]
    names = {v._name + ("_total" if v._type == "counter" else "") for v in instruments}
    documented = set(re.findall(r"^\| `(shoal_\w+)`", (DOCS / "use" / "metrics.md").read_text(), re.MULTILINE))
    assert documented == names


def test_the_table_of_fields_is_the_one_that_is_applied():
    assert fields_table() in (DOCS / "use" / "serve.md").read_text()
