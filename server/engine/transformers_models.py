"""Depth-pruned models of families that vLLM runs through transformers' own code (its transformers backend).

vLLM builds the model with `AutoModel`, here on the meta device, puts its own linear layers and norms into it, and makes
an `Attention` for every layer that the configuration counts. The model is Shoal's transformers class, which has
no attention module where there is no attention; the configuration is shown to that last step as to a KV
cache: kept attention layers only, numbered 0, 1, ..., as the model's own `layer_idx` are. Blocks that share another's
weights in the checkpoint, or are limited to a window, are built as ordinary ones: the weights of the former are made
while loading, the latter get another `Attention`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pruning.families import Family
from pruning.models.configuration import as_fields, cache_view
from pruning.models.modeling import register_models
from pruning.variants.shared import materialised, unshared
from server.engine import variants
from server.engine.loader import check_directory, check_stage
from server.engine.vllm import is_first_worker, replaced, stock


@contextmanager
def _ordinary(config: Any) -> Iterator[None]:
    """Let a configuration describe ordinary attention where it is changed, and no shared weights, inside the `with`."""
    given: Sequence[Any] = config.block_configs
    config.block_configs = as_fields(
        [{**block, "attention": variants.unchanged(block["attention"])} for block in unshared(given)]
    )
    try:
        yield
    finally:
        config.block_configs = given


def define(family: Family) -> type[nn.Module]:
    """The vLLM class of a depth-pruned family."""
    base = stock("transformers").TransformersForCausalLM

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        if is_first_worker():
            check_directory(vllm_config.model_config.model, str(vllm_config.load_config.load_format))
        register_models()
        config = vllm_config.model_config.hf_config
        self.changes = {
            f"{family.blocks}.{block}.{family.attention}": list(variants.changes_of(entry["attention"]))
            for block, entry in enumerate(config.block_configs)
        }
        with _ordinary(config):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        for name, module in self.named_modules():
            for variant, entry in self.changes.get(name, ()):
                if hasattr(module, "attn"):
                    variant.prepare(module, entry)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return set(base.load_weights(self, materialised(weights, self.config.block_configs, family)))

    def pipeline_parallel(self: Any) -> None:
        configs, group = self.config.block_configs, self.pp_group
        start, end = stock("transformers.base").get_pp_indices(len(configs), group.rank_in_group, group.world_size)
        check_stage(configs, start, end, may_lack_attention=False)
        base.pipeline_parallel(self)

    def attention_class(self: Any) -> Callable[..., nn.Module]:
        usual = base._get_attn_cls(self)

        def construct(*, prefix: str, **named: Any) -> nn.Module:
            made = usual
            for variant, entry in self.changes.get(prefix[prefix.index(family.blocks) :].removesuffix(".attn"), ()):
                made = variant.attention_class(entry)
            return made(prefix=prefix, **named)

        return construct

    def create_attention_instances(self: Any, prefix: str = "") -> None:
        here = sorted(self.attention_fusers)  # this stage's, found by walking its modules
        stage = here[0], here[-1] + 1
        whole, self.text_config = self.text_config, cache_view(self.text_config)
        try:
            with replaced({"transformers.base:get_pp_indices": lambda *_: stage}):
                base._create_attention_instances(self, prefix)
        finally:
            self.text_config = whole

    return type(
        family.architecture,
        (base,),
        {
            "__init__": init,
            "load_weights": load_weights,
            "pipeline_parallel": pipeline_parallel,
            "_get_attn_cls": attention_class,
            "_create_attention_instances": create_attention_instances,
            "__module__": "server.engine.models",
            "__doc__": f"{family.name} without the sublayers that `config.block_configs` marks as removed.",
            "has_noops": True,
        },
    )
