"""How many requests a KV cache of so many bytes holds at once, by the shape that the engine itself gives its cache.

A request that is being read takes what vLLM admits it with: in a limited layer its window and the chunks in flight.
One that is being written needs the window alone. Prompts are read one after the other, so the cache is full when the
last one is read beside all others, which write. Without windows both are the same.
"""

from dataclasses import dataclass, replace
from typing import Any

from server.engine.cache_groups import CacheShape, shape_of


@dataclass(frozen=True, slots=True)
class Room:
    """What one engine makes of its share of bytes.

    Attributes:
        blocks: Blocks of the cache, of `group_layers` layers each; vLLM keeps one for itself.
        group_layers: g; no whole number where heads of one layer are in several groups.
        concurrent: Requests at once.
        kv_bytes: Of one token; with windows the mean over a whole request.
        pool_tokens: Tokens that fit.
        limited: Limited layers, all heads or some.
        window: Positions each looks back; 0: there are none.
        in_flight_tokens: Tokens scheduled but not yet settled, at most.
    """

    blocks: int
    group_layers: float
    concurrent: int
    kv_bytes: int
    pool_tokens: int
    limited: int
    window: int
    in_flight_tokens: int


def room(vllm_config: Any, layer_bytes: int, pool_bytes: int, tokens: int) -> Room:
    """How `pool_bytes` hold requests of so many tokens.

    Args:
        vllm_config: Of the engine.
        layer_bytes: One token takes in one layer.
        pool_bytes: Of the cache.
        tokens: Of a request, all read and written.
    """
    shape = shape_of(vllm_config)
    block = shape.group_heads * shape.block_tokens * layer_bytes // shape.layer_heads
    blocks = pool_bytes // block
    free = (blocks - 1) * shape.group_heads
    reading = shape.head_blocks(tokens)
    others = (free - reading) // written(shape, tokens, int(vllm_config.max_concurrent_batches))
    limited = [one for one in shape.types if one.window is not None]
    size = shape.group_heads / shape.layer_heads
    return Room(
        blocks=blocks,
        group_layers=int(size) if size.is_integer() else size,
        concurrent=1 + others,
        kv_bytes=shape.held(tokens) * layer_bytes // shape.layer_heads // tokens,
        pool_tokens=free * tokens // reading if limited else (blocks - 1) * shape.block_tokens,
        limited=sum(len(one.heads) for one in limited),
        window=max((one.window or 0 for one in limited), default=0),
        in_flight_tokens=shape.in_flight_tokens,
    )


def written(shape: CacheShape, tokens: int, steps: int) -> int:
    """Blocks of one head, summed over the heads, of a request that writes, with so many steps in flight."""
    small = replace(shape, in_flight_tokens=steps)
    return shape.group_heads * sum(small.blocks(tokens, window) for window in shape.groups())
