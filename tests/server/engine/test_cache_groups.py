"""What vLLM's own functions allocate for a model with windows is what the plan counts."""

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import utils
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.request import Request

from pruning.models.configuration import as_fields
from pruning.plan import Plan, Sublayer
from server.engine.cache_groups import Attentions, CacheShape, cheapest_group, dense_shape_of, install, shape_of
from tests.conftest import export_pico, pico_model

WINDOW, BLOCK, CHUNK, LONGEST = 1024, 16, 2048, 8192
LAYERS, HEADS = 32, 4
POOL_BYTES = 2**30
# (full, limited) layers -> layers of a group, layers of padding
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
# (full, limited) layers and the full heads of each further one -> heads of a group, heads of padding
HEAD_MIXES = {
    (0, 22, (1,) * 8 + (2,) * 2): (15, 7),
    (2, 20, (1, 3, 2, 1, 1, 2, 3, 1)): (25, 5),
    (0, 31, (1,)): (8, 8),
    (0, 0, (2,) * 32): (64, 0),
    (20, 0, (1, 2, 3)): (29, 24),
}


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """How to get vLLM's configuration of a checkpoint with some layers full, some limited, and their specs."""
    sizes = {"hidden_size": 32, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 8}
    model = pico_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=LONGEST, **sizes)
    plan = Plan(LAYERS, {Sublayer(0, "ffn"): "none"})
    directory = export_pico(model, "llama", plan, tmp_path_factory.mktemp("windows") / "limited")
    options = {"skip_tokenizer_init": True, "load_format": "dummy", "block_size": BLOCK}
    arguments = EngineArgs(str(directory), max_model_len=LONGEST, max_num_batched_tokens=CHUNK, **options)
    config = arguments.create_engine_config()
    shape = {"block_size": BLOCK, "head_size": 8, "dtype": torch.float32}

    def make(
        full: int, limited: int, mixed: tuple[int, ...] = (), *, asynchronous: bool = False, hybrid: bool = True,
        windows: tuple[int, ...] = (WINDOW,),
    ):  # fmt: skip
        specs, blocks = {}, []
        kept = [HEADS] * full + [0] * limited + list(mixed)  # full heads of each layer
        for index in range(LAYERS):
            order = index * 13 % LAYERS  # the kinds are mixed
            entry = {"no_op": order >= len(kept), "emulation": None}
            name = f"model.layers.{index}.self_attn.attn"
            if not entry["no_op"]:
                heads = kept[order]
                if heads:
                    own = f"{name}.full" if heads < HEADS else name
                    specs[own] = FullAttentionSpec(**shape, num_kv_heads=heads)
                if heads < HEADS:
                    window = windows[order % len(windows)]
                    entry["window"] = {"size": window, "sink": True}
                    if heads:
                        entry["window"]["full_heads"] = sorted((index + head) % HEADS for head in range(heads))
                    own = f"{name}.limited" if heads else name
                    specs[own] = SlidingWindowSpec(**shape, num_kv_heads=HEADS - heads, sliding_window=window)
            blocks.append({"attention": entry, "ffn": {"no_op": False, "emulation": None}})
        config.model_config.hf_config.block_configs = as_fields(blocks)
        config.model_config.max_model_len = LONGEST
        config.scheduler_config.async_scheduling = asynchronous
        config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
        config.cache_config.kv_cache_layout = "BLHNC" if mixed else "LBHNC"
        return config, specs

    return make


def heads_of(group) -> int:
    """KV heads of a group of vLLM's."""
    if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
        assert list(group.kv_cache_spec.kv_cache_specs) == group.layer_names
        return sum(spec.num_kv_heads for spec in group.kv_cache_spec.kv_cache_specs.values())
    return len(group.layer_names) * group.kv_cache_spec.num_kv_heads


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("mix", [*MIXES, *HEAD_MIXES])
def test_the_pool_and_what_a_request_reserves_are_as_counted(configure, mix, asynchronous):
    config, specs = configure(*mix, asynchronous=asynchronous)
    (made,) = kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [POOL_BYTES])
    shape = shape_of(config)
    assert shape.in_flight_tokens == CHUNK * (1 + asynchronous)
    size = shape.group_heads
    page = BLOCK * 2 * 8 * 4  # of one head
    assert max(map(heads_of, made.kv_cache_groups)) == size
    assert made.num_blocks == POOL_BYTES // (size * page)
    assert sorted(name for group in made.kv_cache_groups for name in group.layer_names) == sorted(specs)
    needed = kv_cache_utils._max_memory_usage_bytes_from_groups(config, made.kv_cache_groups)
    assert needed == page * shape.head_blocks(LONGEST)
    if not asynchronous:
        padding = size * len(made.kv_cache_groups) - sum(map(heads_of, made.kv_cache_groups))
        expected = HEAD_MIXES[mix] if mix in HEAD_MIXES else tuple(HEADS * count for count in MIXES[mix])
        assert (size, padding) == expected


@pytest.mark.parametrize("mix", [*MIXES, *HEAD_MIXES])
def test_a_request_holds_the_bytes_of_the_plan_but_one_block_a_group(configure, mix):
    full, limited, mixed = (*mix, ())[:3]
    config, specs = configure(*mix)
    plan = (full * HEADS + sum(mixed), {WINDOW: limited * HEADS + len(mixed) * HEADS - sum(mixed)})
    holds_the_bytes_of_the_plan(config, specs, *plan)


@pytest.mark.parametrize("full", [2, 5])
def test_windows_of_several_sizes_take_their_own_bytes(configure, full):
    sizes = (WINDOW, WINDOW // 2, 2 * WINDOW)
    config, specs = configure(full, LAYERS - full, windows=sizes)
    assert {one.window for one in shape_of(config).types} == {None, *sizes}
    limited = dict.fromkeys(sizes, HEADS * (LAYERS - full) // 3)
    holds_the_bytes_of_the_plan(config, specs, full * HEADS, limited)


def holds_the_bytes_of_the_plan(config, specs, full: int, limited: dict[int, int]) -> None:
    """A request as long as the longest takes, what so many KV heads take, within a block a group."""
    (made,) = kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [POOL_BYTES])
    sizes = list(map(heads_of, made.kv_cache_groups))
    made = kv_cache_utils.generate_scheduler_kv_cache_config([made])
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
    assert manager.block_pool.get_num_free_blocks() == made.num_blocks - 1 - sum(taken)
    plan = full * tokens + sum(count * min(window, tokens) for window, count in limited.items())
    assert shape_of(config).held(tokens) == plan
    held_tokens = sum(size * count * BLOCK for size, count in zip(sizes, taken, strict=True))
    assert 0 <= held_tokens - plan <= sum(sizes) * BLOCK


def test_every_tensor_parallel_rank_counts_its_own_heads(configure):
    config, _ = configure(0, 30, (2, 2))
    alone = shape_of(config)
    blocks = config.model_config.hf_config.block_configs
    mixed = [block["attention"]["window"] for block in blocks if "full_heads" in block["attention"]["window"]]
    for window in mixed:
        window["full_heads"] = [1, 2]  # one on each rank
    config.parallel_config.tensor_parallel_size = 2
    try:
        shape = shape_of(config)
    finally:
        config.parallel_config.tensor_parallel_size = 1
    assert shape.layer_heads == HEADS // 2
    assert {one.window: sum(one.heads) for one in shape.types} == {None: 2, WINDOW: 62}
    assert shape.held(LONGEST) * 2 == alone.held(LONGEST)


def test_pages_of_several_sizes_get_a_layout_that_holds_them(configure):
    config, specs = configure(0, 22, (1,) * 10)
    config.cache_config.kv_cache_layout = None
    with pytest.raises(ValueError, match="windows by KV head need an attention backend") as refused:
        utils.resolve_kv_cache_layout(config, [["LHBNC"]], specs.values())
    assert "\n" not in str(refused.value)
    layout = utils.resolve_kv_cache_layout(config, [["LBNHC", "LBHNC", "BLNHC", "BLHNC"]] * 2, specs.values())
    assert layout.name == "BLHNC"
    config.cache_config.kv_cache_layout = None
    assert utils.resolve_kv_cache_layout(config, [["LBHNC"]], specs.values()).name == "BLHNC"  # a CPU
    config, specs = configure(10, 22)
    config.cache_config.kv_cache_layout = None
    assert utils.resolve_kv_cache_layout(config, [["LBHNC", "BLHNC"]], specs.values()).name == "LBHNC"


def test_a_pipeline_stage_without_layers_of_a_group_has_none_of_its_pages(configure):
    config, specs = configure(0, 30, (1, 2))
    full = [name for name in specs if name.endswith(".full")]
    stages = [{name: spec for name, spec in specs.items() if (name in full) == mine} for mine in (False, True)]
    made = kv_cache_utils.get_kv_cache_configs(config, [dict(stage) for stage in stages], [POOL_BYTES] * 2)
    assert made[0].num_blocks == made[1].num_blocks
    for config_of_stage, stage in zip(made, stages, strict=True):
        assert sorted(name for tensor in config_of_stage.kv_cache_tensors for name in tensor.layers) == sorted(stage)


def test_a_dense_model_and_one_without_windows_are_grouped_as_ever(configure):
    config, specs = configure(20, 0)
    assert shape_of(config).types == (Attentions((HEADS,) * 20),)
    assert dense_shape_of(config).types == (Attentions((HEADS,) * LAYERS),)
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    assert [len(group.layer_names) for group in groups] == [20]
    config, mixed = configure(22, 10)
    config.model_config.hf_config.block_configs = None
    groups = kv_cache_utils.get_kv_cache_groups(config, mixed)
    assert max(len(group.layer_names) for group in groups) == 10  # vLLM's own choice


def test_a_window_that_no_text_outgrows_is_none(configure):
    config, _ = configure(10, 20)
    config.model_config.max_model_len = WINDOW
    assert shape_of(config).types == (Attentions((HEADS,) * 30),)


def test_without_the_hybrid_manager_limited_layers_count_as_full_ones(configure):
    config, specs = configure(10, 20, hybrid=False)
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    assert [len(group.layer_names) for group in groups] == [30]
    assert shape_of(config).types == (Attentions((HEADS,) * 30),)


def test_a_draft_is_one_group_and_its_windows_are_computed_only(configure):
    config, specs = configure(10, 20)
    specs |= {f"draft_model.{name}": spec for name, spec in list(specs.items())}
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    drafting = [group for group in groups if group.layer_names[0].startswith("draft_model.")]
    assert [len(group.layer_names) for group in drafting] == [30]
    assert drafting == groups[:1]  # whose blocks vLLM's draft writes to
    assert isinstance(drafting[0].kv_cache_spec, FullAttentionSpec)
    types = Attentions((HEADS,) * 10), Attentions((HEADS,) * 20, WINDOW)
    shape = CacheShape(types, HEADS, BLOCK, CHUNK, LONGEST, together=(HEADS,) * 30)
    assert shape.group_heads == max(map(heads_of, groups)) == 30 * HEADS


def test_a_draft_with_mixed_layers_is_one_group_too(configure):
    config, specs = configure(0, 22, (1,) * 8)
    specs |= {f"draft_model.{name}": spec for name, spec in list(specs.items())}
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    assert heads_of(groups[0]) == 30 * HEADS
    assert all(name.startswith("draft_model.") for name in groups[0].layer_names)
    assert not any(name.startswith("draft_model.") for group in groups[1:] for name in group.layer_names)


def test_installing_twice_is_installing_once():
    install()
    once = kv_cache_utils.get_kv_cache_groups
    install()
    assert kv_cache_utils.get_kv_cache_groups is once


def test_a_further_group_has_to_pay():
    def cheapest(*types: tuple[int, int]) -> int:
        return cheapest_group(tuple(((1,) * count, blocks) for count, blocks in types))

    assert cheapest((22, 512), (8, 193)) == 11  # three groups; 2 would pad nothing, in fifteen
    assert cheapest((17, 512), (13, 193)) == 17
