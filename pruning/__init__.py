"""Offline stage: score, remove, emulate and export the layers of a decoder LLM.

Once this package is imported, `transformers.AutoConfig` and `AutoModelForCausalLM` load depth-pruned checkpoints. It
imports neither torch nor transformers for that: transformers' table of configurations gets an annex that registers our
classes when one of their names is first looked up.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_TABLE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register with transformers' auto classes now (idempotent)."""
    importlib.import_module("pruning.models.modeling").register_models()


class _Annex(dict[Any, Any]):
    """`CONFIG_MAPPING`'s entries from outside transformers; ours appear when asked for."""

    asked = False

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if isinstance(key, str) and key.startswith("depth_pruned_") and not self.asked:
            self.asked = True
            register()
        return super().__contains__(key)


def _prepare(table: ModuleType) -> None:
    mapping = table.CONFIG_MAPPING
    mapping._extra_content = _Annex(mapping._extra_content)


class _WhenLoaded:
    """Import hook that calls `_prepare` right after transformers' table of configurations is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], Any] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _prepare(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _TABLE in sys.modules:
    _prepare(sys.modules[_TABLE])
else:
    sys.meta_path.insert(0, _WhenLoaded())
