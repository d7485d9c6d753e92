"""What the server says of a cache with windows, from numbers alone."""

from dataclasses import replace

import pytest

from pruning.models.checkpoint import Manifest
from server.engine.cache_groups import Attentions, CacheShape
from server.engine.compat import EngineFacts
from server.inventory import take_inventory
from server.routes import describe, summarise

FULL, LIMITED, WINDOW, LONGEST, BLOCK = 6, 24, 1024, 32768, 16
ONE_LAYER = 2 * 3 * 64 * 4
BLOCKS_IN_POOL = 40000


def facts(chunk: int = 2048, hybrid: bool = True) -> EngineFacts:
    windows = {block: WINDOW for block in range(LIMITED)}
    dense = CacheShape((Attentions((3,) * (FULL + LIMITED)),), 3, BLOCK, 2 * chunk, LONGEST)
    types = (Attentions((3,) * FULL), Attentions((3,) * LIMITED, WINDOW)) if hybrid else dense.types
    shape = replace(dense, types=types)
    return EngineFacts(
        capacity_tokens=1, layers=30, kv_heads=3, head_dim=64, kv_tensors=2, kv_dtype_bytes=4, max_running=8,
        max_model_len=LONGEST, windows=windows, shape=shape, dense_shape=dense, pool_blocks=BLOCKS_IN_POOL,
        chunk_tokens=chunk, hybrid=hybrid,
    )  # fmt: skip


@pytest.fixture
def manifest() -> Manifest:
    removed = {f"attention.{block}": "window" for block in range(LIMITED)} | {"ffn.3": "low_rank"}
    fields = {"shoal_version": "0", "base": {}, "recipe": {}, "num_blocks": FULL + LIMITED, "removed": removed,
              "quality": {}, "sizes": {"weights_dense": 1}, "stages": {}, "files": {}}  # fmt: skip
    return Manifest.model_construct(**fields)


def test_limited_layers_are_a_state_of_their_own(tmp_path, manifest):
    inventory = take_inventory(tmp_path, manifest, facts())
    counts = [inventory.count("attention", state) for state in ("kept", "limited", "removed", "emulated")]
    assert counts == [FULL, LIMITED, 0, 0]
    assert inventory.count("ffn", "emulated") == 1


def test_heads_of_a_layer_that_is_limited_in_part_are_counted_by_what_they_keep(tmp_path, manifest):
    by_layer = take_inventory(tmp_path, manifest, facts())
    assert by_layer.kv_heads() == {"full": 3 * FULL, "limited": 3 * LIMITED, "removed": 0}
    manifest.removed["attention.29"] = "low_rank"
    by_head = take_inventory(tmp_path, manifest, replace(facts(), full_heads={3: (2,), 7: (0, 1)}))
    assert by_head.kv_heads() == {"full": 3 * (FULL - 1) + 3, "limited": 3 * LIMITED - 3, "removed": 3}
    answer = describe(manifest, by_head)
    assert answer["kv_heads"] == by_head.kv_heads() | {"full_heads": {"3": [2], "7": [0, 1]}}
    assert answer["sublayers"][3]["attention"] == "limited"
    assert summarise(manifest, by_head)["kv_heads"] == by_head.kv_heads()


def test_a_request_is_told_by_its_length(tmp_path, manifest):
    inventory = take_inventory(tmp_path, manifest, facts())
    assert [context.tokens for context in inventory.contexts] == [1024, 8192, LONGEST]
    short, middle, long = inventory.contexts
    assert short.request_bytes == short.request_bytes_dense == 30 * 1024 * ONE_LAYER
    assert middle.request_bytes == (FULL * 8192 + LIMITED * WINDOW) * ONE_LAYER
    assert middle.request_bytes / middle.request_bytes_dense == pytest.approx(0.3)
    assert inventory.kv_bytes_per_token == long.request_bytes // LONGEST
    pool = BLOCKS_IN_POOL * FULL * BLOCK * ONE_LAYER  # blocks of six layers
    assert inventory.capacity_bytes == pool
    for context in inventory.contexts:
        assert context.fitting_tokens_dense == pool // (30 * ONE_LAYER)
    assert short.fitting_tokens == short.fitting_tokens_dense
    assert middle.fitting_tokens_dense < middle.fitting_tokens < long.fitting_tokens
    blocks = LONGEST // BLOCK + 4 * (-(-(WINDOW - 1 + 4096) // BLOCK) + 1)  # four groups of limited layers
    assert long.fitting_tokens == BLOCKS_IN_POOL * LONGEST // blocks


def test_bytes_and_room_count_heads(tmp_path, manifest):
    layers = facts()
    types = Attentions((1,) * 8 + (2,) * 2), Attentions((3,) * 20 + (2,) * 8 + (1,) * 2, WINDOW)  # 12 of 90 heads full
    inventory = take_inventory(tmp_path, manifest, replace(layers, shape=replace(layers.shape, types=types)))
    long = inventory.contexts[-1]
    assert 3 * long.request_bytes == (12 * LONGEST + 78 * WINDOW) * ONE_LAYER
    assert long.request_bytes_dense == 30 * LONGEST * ONE_LAYER
    assert 3 * inventory.capacity_bytes == BLOCKS_IN_POOL * 13 * BLOCK * ONE_LAYER  # blocks of 13 heads
    blocks = LONGEST // BLOCK + 6 * (
        -(-(WINDOW - 1 + 4096) // BLOCK) + 1
    )  # one group of full heads, six of limited ones
    assert long.fitting_tokens == BLOCKS_IN_POOL * LONGEST // blocks


def test_chunks_in_flight_are_named_with_what_smaller_ones_would_give(tmp_path, manifest):
    (note,) = take_inventory(tmp_path, manifest, facts()).notes
    assert "4,096 tokens that may be in flight" in note
    small = take_inventory(tmp_path, manifest, facts(1024))
    assert f"with --max-num-batched-tokens 1024 instead of 2048 {small.contexts[-1].fitting_tokens:,} would" in note
    assert "instead of" not in small.notes[0]
    assert small.lines()[1:] == [
        "Tokens that fit (dense), by the length of a request: "
        + "; ".join(f"{c.fitting_tokens:,} ({c.fitting_tokens_dense:,}) at {c.tokens:,}" for c in small.contexts),
        *small.notes,
    ]


def test_without_the_hybrid_manager_one_line_says_that_nothing_is_saved(tmp_path, manifest):
    inventory = take_inventory(tmp_path, manifest, facts(hybrid=False))
    (warning,) = inventory.warnings
    assert "windows save no KV cache" in warning
    assert "\n" not in warning
    assert inventory.notes == ()
    for context in inventory.contexts:
        assert context.fitting_tokens == context.fitting_tokens_dense
