"""How many requests a KV cache holds at once: never more than its bytes, and without windows what it always was."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

BLOCK, CHUNK, LENGTH, LAYERS, LAYER_BYTES, WINDOW = 32, 512, 2112, 30, 1536, 256
spec = importlib.util.spec_from_file_location("room", Path(__file__).parents[2] / "benchmarks" / "room.py")
room = importlib.util.module_from_spec(spec)
spec.loader.exec_module(room)


def config(removed: int = 0, limited: int = 0, steps: int = 1) -> SimpleNamespace:
    """What is read of vLLM's configuration."""
    entries = [{"no_op": index < removed} for index in range(LAYERS)]
    for entry in entries[LAYERS - limited :]:
        entry["window"] = {"size": WINDOW, "sink": True}
    text = SimpleNamespace(block_configs=[{"attention": entry} for entry in entries])
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, max_model_len=LENGTH, get_num_kv_heads=lambda parallel: 3),
        parallel_config=None,
        cache_config=SimpleNamespace(block_size=BLOCK, sliding_window=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        max_in_flight_tokens=steps * CHUNK,
        max_concurrent_batches=steps,
    )


@pytest.mark.parametrize("removed", [0, 6, 10, 15])
@pytest.mark.parametrize("tokens", [336, 2064])
def test_removal_leaves_room_by_the_layers_that_are_left(removed, tokens):
    kept, each = LAYERS - removed, -(-tokens // BLOCK)
    pool = (4 * each + 1) * BLOCK * LAYERS * LAYER_BYTES
    found = room.room(config(removed), LAYER_BYTES, pool, tokens)
    assert found.blocks == pool // (BLOCK * kept * LAYER_BYTES)
    assert found.concurrent == (found.blocks - 1) // each
    assert found.kv_bytes == kept * LAYER_BYTES
    assert found.pool_tokens == (found.blocks - 1) * BLOCK
    assert (found.limited, found.window) == (0, 0)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("limited", [8, 18, 24])
def test_windows_hold_one_that_is_read_and_all_others_that_write(limited, steps):
    tokens = 2064
    pool = (3 * -(-tokens // BLOCK) + 1) * BLOCK * LAYERS * LAYER_BYTES
    found = room.room(config(limited=limited, steps=steps), LAYER_BYTES, pool, tokens)
    full = (LAYERS - limited) * tokens
    assert found.kv_bytes == (full + limited * WINDOW) * LAYER_BYTES // tokens
    shape = room.shape_of(config(limited=limited, steps=steps))
    size = shape.group_heads
    assert size == 3 * found.group_layers
    reading = shape.head_blocks(tokens)
    writing = room.written(shape, tokens, steps)
    taken = reading + (found.concurrent - 1) * writing
    assert found.blocks * size * BLOCK * LAYER_BYTES <= 3 * pool
    assert taken <= (found.blocks - 1) * size < taken + writing
    assert 3 * (full // BLOCK + limited * WINDOW // BLOCK) <= writing < reading
    assert found.concurrent > 3 or limited == 8
