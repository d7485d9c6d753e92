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
        group_layers: g.
        concurrent: Requests at once.
        kv_bytes: Of one token; with windows the mean over a whole request.
        pool_tokens: Tokens that fit.
        limited: Limited layers.
        window: Positions each looks back; 0: there are none.
        in_flight_tokens: Tokens scheduled but not yet settled, at most.
    """

    blocks: int
    group_layers: int
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
    block = shape.group_layers * shape.block_tokens * layer_bytes
    blocks = pool_bytes // block
    free = (blocks - 1) * shape.group_layers
    reading = shape.layer_blocks(tokens)
    others = (free - reading) // written(shape, tokens, int(vllm_config.max_concurrent_batches))
    limited = [one for one in shape.layers if one.window is not None]
    return Room(
        blocks=blocks,
        group_layers=shape.group_layers,
        concurrent=1 + others,
        kv_bytes=shape.held(tokens) * layer_bytes // tokens,
        pool_tokens=free * tokens // reading if limited else (blocks - 1) * shape.block_tokens,
        limited=sum(one.count for one in limited),
        window=max((one.window or 0 for one in limited), default=0),
        in_flight_tokens=shape.in_flight_tokens,
    )


def written(shape: CacheShape, tokens: int, steps: int) -> int:
    """Blocks of one layer, summed over the layers, of a request that writes, with so many steps in flight."""
    size, small = shape.group_layers, replace(shape, in_flight_tokens=steps)
    return size * sum(-(-one.count // size) * small.blocks(tokens, one.window) for one in shape.layers)
