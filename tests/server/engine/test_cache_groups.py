"""What vLLM's own functions allocate for a model with windows is what the plan counts."""

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.request import Request

from pruning.models.configuration import as_fields
from pruning.plan import Plan, Sublayer
from server.engine.cache_groups import CacheShape, Layers, cheapest_group, dense_shape_of, install, shape_of
from tests.conftest import export_pico, pico_model

WINDOW, BLOCK, CHUNK, LONGEST = 1024, 16, 2048, 8192
LAYERS = 32
POOL_BYTES = 2**30
# (full, limited) -> layers of a group, layers of padding
MIXES = {
    (22, 8): (11, 3),
    (22, 10): (11, 1),
    (15, 15): (15, 0),
    (10, 20): (10, 0),
    (17, 13): (17, 4),
    (8, 24): (8, 0),
    (6, 24): (6, 0),
    (30, 0): (30, 0),
    (0, 30): (30, 0),
}


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """How to get vLLM's configuration of a checkpoint with some layers full, some limited, and their specs."""
    model = pico_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=LONGEST, hidden_size=32)
    plan = Plan(LAYERS, {Sublayer(0, "ffn"): "none"})
    directory = export_pico(model, "llama", plan, tmp_path_factory.mktemp("windows") / "limited")
    options = {"skip_tokenizer_init": True, "load_format": "dummy", "block_size": BLOCK}
    arguments = EngineArgs(str(directory), max_model_len=LONGEST, max_num_batched_tokens=CHUNK, **options)
    config = arguments.create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}

    def make(full: int, limited: int, *, asynchronous: bool = False, hybrid: bool = True):
        specs, blocks = {}, []
        for index in range(LAYERS):
            order = index * 13 % LAYERS  # the kinds are mixed
            entry = {"no_op": order >= full + limited, "emulation": None}
            name = f"model.layers.{index}.self_attn.attn"
            if order < full:
                specs[name] = FullAttentionSpec(**shape)
            elif order < full + limited:
                entry["window"] = {"size": WINDOW, "sink": True}
                specs[name] = SlidingWindowSpec(**shape, sliding_window=WINDOW)
            blocks.append({"attention": entry, "ffn": {"no_op": False, "emulation": None}})
        config.model_config.hf_config.block_configs = as_fields(blocks)
        config.model_config.max_model_len = LONGEST
        config.scheduler_config.async_scheduling = asynchronous
        config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
        return config, specs

    return make


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("full", "limited"), MIXES)
def test_the_pool_and_what_a_request_reserves_are_as_counted(configure, full, limited, asynchronous):
    config, specs = configure(full, limited, asynchronous=asynchronous)
    (made,) = kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [POOL_BYTES])
    shape = shape_of(config)
    assert shape.in_flight_tokens == CHUNK * (1 + asynchronous)
    size = shape.group_layers
    page = next(iter(specs.values())).page_size_bytes
    assert max(len(group.layer_names) for group in made.kv_cache_groups) == size
    assert made.num_blocks == POOL_BYTES // (size * page)
    assert sorted(name for group in made.kv_cache_groups for name in group.layer_names) == sorted(specs)
    needed = kv_cache_utils._max_memory_usage_bytes_from_groups(config, made.kv_cache_groups)
    assert needed == page * shape.layer_blocks(LONGEST)
    if not asynchronous:
        padding = size * len(made.kv_cache_groups) - full - limited
        assert (size, padding) == MIXES[full, limited]


@pytest.mark.parametrize(("full", "limited"), MIXES)
def test_a_request_holds_the_bytes_of_the_plan_but_one_block_a_group(configure, full, limited):
    config, specs = configure(full, limited)
    (made,) = kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [POOL_BYTES])
    manager = KVCacheManager(
        made, LONGEST, BLOCK, BLOCK, max_in_flight_tokens=config.max_in_flight_tokens, enable_caching=False
    )
    request = Request("one", list(range(LONGEST - 64)), SamplingParams(max_tokens=64), None)
    while request.num_computed_tokens < LONGEST - 64:  # chunks of the prompt, then a token a step
        new = min(CHUNK, LONGEST - 64 - request.num_computed_tokens)
        assert manager.allocate_slots(request, new) is not None
        request.num_computed_tokens += new
    for token in range(63):
        request.append_output_token_ids(token)
        assert manager.allocate_slots(request, 1) is not None
        request.num_computed_tokens += 1
    tokens = request.num_computed_tokens
    taken, wanted = [], []
    for group, blocks in zip(made.kv_cache_groups, manager.get_blocks("one").blocks, strict=True):
        held = [block for block in blocks if not block.is_null]
        window = getattr(group.kv_cache_spec, "sliding_window", None)
        taken.append(len(held))
        wanted.append(min(tokens, window or tokens) / BLOCK)
    assert all(0 <= mine - theirs <= 1 for mine, theirs in zip(taken, wanted, strict=True)), (taken, wanted)
    size = shape_of(config).group_layers
    assert manager.block_pool.get_num_free_blocks() == made.num_blocks - 1 - sum(taken)
    held_tokens = sum(len(group.layer_names) * count * BLOCK
                      for group, count in zip(made.kv_cache_groups, taken, strict=True))  # fmt: skip
    assert 0 <= held_tokens - shape_of(config).held(tokens) <= size * len(taken) * BLOCK


def test_a_dense_model_and_one_without_windows_are_grouped_as_ever(configure):
    config, specs = configure(20, 0)
    assert shape_of(config).layers == (Layers(20),)
    assert dense_shape_of(config).layers == (Layers(LAYERS),)
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    assert [len(group.layer_names) for group in groups] == [20]
    config, mixed = configure(22, 10)
    config.model_config.hf_config.block_configs = None
    groups = kv_cache_utils.get_kv_cache_groups(config, mixed)
    assert max(len(group.layer_names) for group in groups) == 10  # vLLM's own choice


def test_a_window_that_no_text_outgrows_is_none(configure):
    config, _ = configure(10, 20)
    config.model_config.max_model_len = WINDOW
    assert shape_of(config).layers == (Layers(30),)


def test_without_the_hybrid_manager_limited_layers_count_as_full_ones(configure):
    config, specs = configure(10, 20, hybrid=False)
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    assert [len(group.layer_names) for group in groups] == [30]
    assert shape_of(config).layers == (Layers(30),)


def test_a_draft_is_one_group_and_its_windows_are_computed_only(configure):
    config, specs = configure(10, 20)
    specs |= {f"draft_model.{name}": spec for name, spec in list(specs.items())}
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    drafting = [group for group in groups if group.layer_names[0].startswith("draft_model.")]
    assert [len(group.layer_names) for group in drafting] == [30]
    assert drafting == groups[:1]  # whose blocks vLLM's draft writes to
    assert isinstance(drafting[0].kv_cache_spec, FullAttentionSpec)
    shape = CacheShape((Layers(10), Layers(20, WINDOW)), BLOCK, CHUNK, LONGEST, together=30)
    assert shape.group_layers == max(len(group.layer_names) for group in groups) == 30


def test_installing_twice_is_installing_once():
    install()
    once = kv_cache_utils.get_kv_cache_groups
    install()
    assert kv_cache_utils.get_kv_cache_groups is once


def test_a_further_group_has_to_pay():
    assert cheapest_group([(22, 512), (8, 193)]) == 11  # three groups; 2 would pad nothing, in fifteen
    assert cheapest_group([(17, 512), (13, 193)]) == 17
