"""Recipe files, those of this package and anybody's: YAML whose keys are the flags. Faults are named with their line.

keys = read(find("best"))                    # the effort `best`, as `prune-export recipes best` prints it
merged(keys, {"weight_budget"})              # without what contradicts a flag
"""

import difflib
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pruning.errors import RecipeError
from pruning.importance import metric
from pruning.plan import parse_amount, parse_bytes, parse_share
from pruning.recipe import Recipe

EFFORTS = ("quick", "balanced", "best")
ADAPTERS = "-adapters"
"""Ends the name of an effort's recipe for requests that windows are not for, such as a budget in weights."""

AMOUNTS = (
    {"kv_budget"}, {"weight_budget"}, {"max_loss_increase"}, {"target_tokens", "kv_memory"},
    {"attention", "ffn", "blocks"}, {"sublayers"},
)  # fmt: skip
"""Keys that say how much goes; those of one set go together, those of two contradict each other."""

CHECKS: dict[str, Callable[[str], object]] = {
    "importance": metric,
    "kv_memory": parse_bytes,
    **{key: partial(parse_share, what=key.replace("_", "-")) for key in ("kv_budget", "weight_budget")},
    **{key: partial(parse_amount, total=None, what=key) for key in ("attention", "ffn", "blocks", "sublayers")},
}


def shipped() -> dict[str, Path]:
    """The recipes of this package by name: efforts first, then published methods."""
    paths = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
    first = [name for effort in EFFORTS for name in (effort, effort + ADAPTERS)]
    return {name: paths[name] for name in (*first, *(name for name in paths if name not in first))}


def about(path: Path) -> str:
    """What a recipe is for: its first line, a comment."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def find(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: Of a recipe of this package, or a path; `./best` is a file even where `best` is a recipe.

    Raises:
        RecipeError: Neither.
    """
    known = shipped()
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(known)}"
    raise RecipeError(f"--recipe {name}: does not exist, neither a file nor a recipe of `prune-export recipes`; {hint}")


def read(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, each looked at by itself; those without a value are left out.

    Raises:
        RecipeError: It cannot be read, is no YAML mapping, or a key or its value is wrong; with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root, keys = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{path}{line}: this is not YAML: {problem}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"cannot read recipe {path}: {reason}") from error
    if root is None:
        return {}
    if not (isinstance(keys, dict) and all(isinstance(key, str) for key in keys)):
        raise RecipeError(f"{path}: a recipe is lines of `key: value`, such as `attention: 10`")
    seen: dict[str, int] = {}
    for node, value in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in seen:
            raise RecipeError(f"{path}:{line}: {key} is given twice, first in line {seen[key]}")
        seen[key] = line
        _check(path, line, key, keys[key], value)
    return {key: value for key, value in keys.items() if value is not None}


def _check(path: Path, line: int, key: str, value: object, node: yaml.Node) -> None:
    """Refuse a key that is no flag, or a value that its flag does not take."""
    if key not in Recipe.model_fields:
        near = difflib.get_close_matches(key.replace("-", "_"), Recipe.model_fields, 1)
        raise RecipeError(f"{path}:{line}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        if key in CHECKS and value is not None and not isinstance(value, list | dict):
            CHECKS[key](str(value))
        Recipe.model_validate({key: value})
    except RecipeError as error:
        raise RecipeError(f"{path}:{line}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        which = next((part for part in first["loc"][1:] if isinstance(part, int) and part < len(items)), None)
        line = line if which is None else items[which].start_mark.line + 1
        raise RecipeError(f"{path}:{line}: {key}: {first['msg']} (got {first['input']!r})") from error


def merged(keys: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The keys of a recipe that flags leave standing.

    A flag wins over its own key, and over keys that contradict it: other ways to say how much goes, and how long to
    train where nothing is trained.

    Args:
        keys: Of the recipe.
        given: Keys of the flags that were given, and `heal=none` where that was one.
    """
    amounts = [group for group in AMOUNTS if group & set(given)]
    dropped = set(given)
    if amounts:
        dropped |= set().union(*AMOUNTS) - set().union(*amounts)
    if "heal=none" in given:
        dropped |= {"heal_minutes", "heal_steps"}
    return {key: value for key, value in keys.items() if key not in dropped}
