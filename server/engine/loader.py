"""Refuse a damaged checkpoint before any weight is loaded."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning.errors import CheckpointError
from pruning.models.checkpoint import verify
from server.engine import variants

SKIP_VERIFICATION = "SHOAL_SKIP_VERIFICATION"


def check_directory(model: str, load_format: str) -> None:
    """Check every file of a checkpoint against its manifest, unless `SHOAL_SKIP_VERIFICATION=1` or weights are dummies.

    Raises:
        CheckpointError: The checkpoint is incomplete, altered or of another format version.
    """
    if load_format == "dummy" or os.environ.get(SKIP_VERIFICATION) == "1":
        return
    directory = Path(model)
    if not directory.is_dir():
        raise CheckpointError(f"{model} is not a directory; download the checkpoint first and give its path")
    verify(directory)


def check_stage(block_configs: Sequence[Any], start: int, end: int, *, may_lack_attention: bool) -> None:
    """Check that one pipeline stage can run by itself.

    Args:
        block_configs: One entry a block of the whole model.
        start: First block of the stage.
        end: One past its last.
        may_lack_attention: Whether one attention layer anywhere in the model is enough.

    Raises:
        CheckpointError: No attention layer is left, or an emulation reads an attention layer of another stage.
    """
    stage, split = f"the pipeline stage of blocks {start} to {end - 1}", "set VLLM_PP_LAYER_PARTITION to another split"
    if all(block["attention"]["no_op"] for block in block_configs):
        raise CheckpointError("the model has no attention layer left, and vLLM cannot size its KV cache; keep one")
    if not may_lack_attention and lacks_attention(block_configs, start, end):
        raise CheckpointError(f"{stage} has no attention layer left, and vLLM cannot size its KV cache; {split}")
    for index in range(start, end):
        for kind in ("attention", "ffn"):
            emulation = block_configs[index][kind]["emulation"] or {}
            for source in emulation.get("sources", ()):
                if not start <= source < end:
                    what = variants.stand_in(emulation).reads
                    raise CheckpointError(
                        f"{stage} reads the {what} of block {source}, which another stage holds; {split}"
                    )


def lacks_attention(block_configs: Sequence[Any], start: int, end: int) -> bool:
    """Whether blocks `start` to `end - 1` have lost all their attention layers."""
    return all(block_configs[index]["attention"]["no_op"] for index in range(start, end))


def full_heads_of_ranks(full_heads: Sequence[int], kv_heads: int, ranks: int) -> list[list[int]]:
    """Which heads keep every token, of those that each tensor-parallel rank holds, counted from its first one.

    Args:
        full_heads: Of a layer that is limited but for these.
        kv_heads: K, of the layer; where there are more ranks than heads, ranks share one.
        ranks: How many.

    Raises:
        CheckpointError: A rank has more or fewer of them than another, and vLLM gives all ranks the same cache.
    """
    each, firsts = max(1, kv_heads // ranks), [rank * kv_heads // ranks for rank in range(ranks)]
    found = [[head - first for head in full_heads if first <= head < first + each] for first in firsts]
    if len(set(map(len, found))) > 1:
        raise CheckpointError(
            f"--tensor-parallel-size {ranks} does not cut the windows by head evenly: the ranks have "
            f"{', '.join(str(len(one)) for one in found)} full KV heads of one layer; prune with "
            f"--tensor-parallel {ranks}"
        )
    return found


def check_units(units: int, ranks: int, block: object) -> None:
    """Check that tensor-parallel ranks can share the units of an FFN.

    Raises:
        CheckpointError: They cannot.
    """
    if units % ranks:
        raise CheckpointError(f"--tensor-parallel-size {ranks} does not divide the {units} FFN units of block {block}")


def check_eager(block_configs: Sequence[Any], *, eager: bool) -> None:
    """Check that steps are run as they come, where their shapes differ.

    Raises:
        CheckpointError: They would be captured or compiled.
    """
    changing = [b for b, each in enumerate(block_configs) for v, _ in variants.ffn_changes_of(each["ffn"]) if v.eager]
    if changing and not eager:
        raise CheckpointError(
            f"FFNs of {len(changing)} blocks are skipped by some tokens, and neither CUDA graphs nor torch.compile can "
            "hold steps whose shapes differ; serve it with --enforce-eager and without pipeline stages, or serve the "
            "dense model"
        )


def check_ranks(fields: Mapping[str, Any], ranks: int) -> None:
    """Check, by the fields of a `config.json`, that tensor-parallel ranks can share each layer's full heads and units.

    Raises:
        CheckpointError: They cannot.
    """
    kv_heads = fields.get("num_key_value_heads") or fields.get("num_attention_heads")
    for index, block in enumerate(fields.get("block_configs") or ()):
        check_units(int(block["ffn"].get("intermediate_size") or 0), ranks, index)
        if full_heads := variants.full_heads_of(block["attention"]):
            full_heads_of_ranks(full_heads, int(kv_heads or 1), ranks)
