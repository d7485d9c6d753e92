"""What the house promises about itself, read off its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pruning.variants import VARIANTS

ROOT = Path(__file__).parent.parent
ROOMS = [path for name in ("pruning", "server") for path in (ROOT / name).rglob("") if path.name != "__pycache__"]
FILES = [path for room in ROOMS for path in sorted(room.glob("*.py"))]
VARIANT_ROOMS = (ROOT / "pruning/variants", ROOT / "server/engine/variants")
NAMES = {*VARIANTS, *(name.replace("_", "-") for name in VARIANTS), *(row.entry for row in VARIANTS.values())}
ENTRIES = {"entry", "entries", "spec", "emulation", "described", "attention", "ffn"}
"""Names of variables that hold what a checkpoint says of a sublayer."""


def named(node: ast.AST) -> str:
    """The last name of an expression such as `self.entry`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def is_cache(node: ast.AST) -> bool:
    """Whether an expression is what a kind keeps in the KV cache: "none", "window" or "full", no name of a kind."""
    return named(node.func) == "cache_of" if isinstance(node, ast.Call) else named(node) == "cache"


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and value of every text that is compared, matched, or looked up in an entry of a checkpoint."""
    for node in ast.walk(tree):
        places: list[ast.AST] = []
        if isinstance(node, ast.Compare) and not any(map(is_cache, [node.left, *node.comparators])):
            places = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.Subscript) and named(node.value) in ENTRIES:
            places = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            looked_up = node.func.attr == "get" and named(node.func.value) in ENTRIES
            if looked_up or node.func.attr in ("startswith", "endswith"):
                places = list(node.args)
        for place in places:
            constants = [each for each in getattr(place, "elts", [place]) if isinstance(each, ast.Constant)]
            yield from ((each.lineno, each.value) for each in constants if isinstance(each.value, str))


def test_only_a_variants_own_file_tests_its_name():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in FILES
        if path.parent not in VARIANT_ROOMS
        for line, text in compared_texts(ast.parse(path.read_text()))
        if text in NAMES
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["kind == 'low_rank'", "kind in ('bias', 'x')", "entry['window']", "self.spec.get('kv_share')",
     "kind.startswith('context')", "match kind:\n case 'shared': pass"],
)  # fmt: skip
def test_the_check_sees(source):
    assert NAMES & {text for _, text in compared_texts(ast.parse(source))}


def test_the_check_lets_caches_and_other_names_be():
    source = "cache_of(kind) == 'window'; row.cache == 'window'; sizes['context']; Emulation = 'low-rank'"
    assert not NAMES & {text for _, text in compared_texts(ast.parse(source))}


def test_no_file_is_long():
    assert {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > 450} == set()


def test_no_room_is_crowded():
    assert {str(room.relative_to(ROOT)) for room in ROOMS if len(list(room.glob("*.py"))) > 20} == set()
