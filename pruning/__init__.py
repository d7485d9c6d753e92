"""Offline stage: score, remove, emulate and export the layers of a decoder LLM.

Once this package is imported, `transformers.AutoConfig` and `AutoModelForCausalLM` load depth-pruned checkpoints. It
imports neither torch nor transformers for that: registration waits until transformers loads its auto classes.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


def _call(module: str, function: str) -> None:
    getattr(importlib.import_module(module), function)()


_WHEN_LOADED: dict[str, tuple[str, str]] = {
    "transformers.models.auto.configuration_auto": ("pruning.configuration", "register_configs"),
    "transformers.models.auto.modeling_auto": ("pruning.modeling", "register_models"),
}


class _Registrar:
    """Import hook that registers our classes right after transformers' auto modules are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _WHEN_LOADED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], Any] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _call(*_WHEN_LOADED[name])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now (idempotent): for code that imported transformers' auto classes before this package."""
    for call in _WHEN_LOADED.values():
        _call(*call)


for _name, _pending in _WHEN_LOADED.items():
    if _name in sys.modules:
        _call(*_pending)
sys.meta_path.insert(0, _Registrar())
