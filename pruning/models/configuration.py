"""Configuration classes of depth-pruned checkpoints: the base family's fields and `block_configs`."""

import copy
import importlib
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from pruning.families import FAMILIES, Family


class Fields(dict[str, Any]):
    """A JSON object whose keys are attributes too (vLLM reads `block_configs[i].attention.no_op`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


def as_fields(value: Any) -> Any:
    """Turn nested JSON objects into `Fields`."""
    if isinstance(value, dict):
        return Fields({key: as_fields(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return [as_fields(item) for item in value]
    return value


def base_config_class(family: Family) -> type[PretrainedConfig]:
    """The configuration class of the dense family."""
    module = importlib.import_module(family.transformers_module)
    return getattr(module, family.config or f"{family.name}Config")


def config_class(family: Family) -> type[PretrainedConfig]:
    """The module-level (so picklable) configuration class of a depth-pruned family."""
    return globals()[f"DepthPruned{family.name}Config"]


def cache_view(config: Any) -> Any:
    """The configuration as a KV cache has to see it: only the layers that keep their attention.

    transformers builds a cache from `config.get_text_config(decoder=True)`, one entry a layer, typed by
    `layer_types`; the kept attention layers are numbered 0, 1, ... in it.
    """
    kept = [i for i, block in enumerate(config.block_configs) if not block["attention"]["no_op"]]
    if len(kept) == config.num_hidden_layers:
        return config
    view = copy.copy(config)
    view.block_configs = [config.block_configs[i] for i in kept]
    if getattr(config, "layer_types", None):
        view.layer_types = [config.layer_types[i] for i in kept]
    view.num_hidden_layers = len(kept)
    return view


def _define(family: Family) -> type[PretrainedConfig]:
    base = base_config_class(family)

    def post_init(self: Any, **kwargs: Any) -> None:
        self.block_configs = as_fields(self.block_configs or [])
        base.__post_init__(self, **kwargs)

    def get_text_config(self: Any, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        return cache_view(self) if decoder else base.get_text_config(self, decoder, encoder)

    return type(
        f"DepthPruned{family.name}Config",
        (base,),
        {
            "__module__": __name__,
            "__doc__": f"{family.name} with `block_configs`: one entry a block (the Nemotron-NAS convention).",
            "__annotations__": {"block_configs": list | None},
            "__post_init__": post_init,
            "get_text_config": get_text_config,
            "model_type": family.pruned_model_type,
            "block_configs": None,
        },
    )


for _family in FAMILIES.values():
    globals()[f"DepthPruned{_family.name}Config"] = _define(_family)


def register_configs() -> None:
    """Register every configuration class with transformers (idempotent)."""
    for family in FAMILIES.values():
        AutoConfig.register(family.pruned_model_type, config_class(family), exist_ok=True)
