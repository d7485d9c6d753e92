"""What Shoal takes from vLLM is listed, and the installed version has all of it as it is taken."""

import ast
from pathlib import Path

import pytest

from server.engine.contract import CONTRACT, Taken
from tests.contract.reading import Sources, breach, breaches

SERVER = Path(__file__).parents[2] / "server"
MODELS = "model_executor.models"


def seams() -> tuple[Taken, ...]:
    """The model classes of every family, from SEAMS; read, because the module that holds them imports vLLM."""
    tree = ast.parse((SERVER / "engine" / "models.py").read_text())
    table = next(n for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and getattr(n.target, "id", "") == "SEAMS")
    texts = {n.value for n in ast.walk(table) if isinstance(n, ast.Constant) and ":" in str(n.value)}
    modules = {
        n.args[1].value for n in ast.walk(table) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Seam"
    }
    return tuple(Taken(f"{MODELS}.{text}") for text in sorted(texts)) + tuple(
        Taken(f"{MODELS}.{module}:make_layers") for module in sorted(modules)
    )


def imported() -> set[str]:
    """`module:name` of every import of vLLM in server/, below `vllm`."""
    found: set[str] = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                home = (node.module or "").removeprefix("vllm").removeprefix(".")
                found |= {f"{home}:{alias.name}" for alias in node.names}
    return found


def test_the_installed_version_keeps_the_contract():
    assert breaches(Sources.installed(), CONTRACT + seams()) == []


def test_every_import_of_vllm_is_in_the_contract():
    places = [place for taken in CONTRACT for place in (taken.place, taken.moved) if place]
    modules = {place.partition(":")[0] for place in places}
    known = {f"{place.partition(':')[0]}:{place.partition(':')[2].partition('.')[0]}" for place in places}
    known |= {f"{module.rpartition('.')[0]}:{module.rpartition('.')[2]}" for module in modules}
    assert sorted(imported() - known) == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("def get_kv_cache_groups(", "def make_kv_cache_groups(", "there is no such name"),
        ("    kv_cache_spec: dict[str, KVCacheSpec],\n) -> list[KVCacheGroupSpec]:\n    \"\"\"Split",
         "    specs: dict[str, KVCacheSpec],\n) -> list[KVCacheGroupSpec]:\n    \"\"\"Split", "has the parameters"),
        ("_get_packed_kv_cache_groups(vllm_config", "_other(vllm_config", "does not look _get_packed"),
    ],
)  # fmt: skip
def test_a_changed_name_breaks_it(old, new, why):
    (taken,) = (each for each in CONTRACT if each.place.endswith(":get_kv_cache_groups"))
    installed = Sources.installed()
    assert breach(installed, taken) is None

    def read(name):
        text = installed._read(name)
        if not name.endswith("kv_cache_utils.py"):
            return text
        assert old in text
        return text.replace(old, new)

    assert why in breach(Sources(read), taken)
