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


_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register with transformers' auto classes now (idempotent)."""
    importlib.import_module("pruning.modeling").register_models()


def _loaded(name: str) -> None:
    """Register once transformers' module `name` is complete, unless our own modules are being imported right now."""
    if "pruning.configuration" in sys.modules:
        return
    if name == _MODELS:
        register()
    elif _MODELS not in sys.modules:
        importlib.import_module(_MODELS)


class _Registrar:
    """Import hook that calls `_loaded` right after either of transformers' auto modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in (_CONFIGURATIONS, _MODELS):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], Any] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _loaded(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _CONFIGURATIONS in sys.modules:
    register()
sys.meta_path.insert(0, _Registrar())
