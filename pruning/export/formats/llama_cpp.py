"""The `gguf` format: one file for llama.cpp, whose `deci` architecture has blocks without attention.

Queries and keys are stored in llama.cpp's order of rotary pairs. A block that keeps attention and lost its FFN gets one
of 32 zero units, because llama.cpp skips what such a block's attention adds. Checked by running what is written with
llama.cpp (the package xllamacpp).
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor

from pruning.export.formats import PrunedModel
from pruning.export.formats.nemotron_nas import FAMILIES, windows

EMPTY_FFN = 32
FILE = "model.gguf"
KINDS = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def refusal(pruned: PrunedModel) -> str | None:
    """What llama.cpp's `deci` does not compute."""
    family, fields = pruned.family, pruned.fields
    if family.model_type not in FAMILIES:
        return f"deci's blocks compute what Llama's do, and {family.name}'s differ; it holds {', '.join(FAMILIES)}"
    if (size := windows(pruned)) is not None:
        return f"deci has no sliding window, and this {family.name} has one of {size} tokens"
    if pruned.block_configs[0]["attention"]["no_op"]:
        return "llama.cpp takes the head size from block 0, which has to keep its attention; prune again with --keep 0"
    rope = str((fields.get("rope_parameters") or {}).get("rope_type", "default"))
    if rope != "default":
        return f"rotary positions of type {rope} are not written"
    if splitting(pruned.companions) is None:
        return "the tokenizer is not one of those llama.cpp knows by name here (gpt-2, smollm, llama 3, qwen 2)"
    return None


def splitting(directory: Path) -> str | None:
    """llama.cpp's name for how a tokenizer splits text; None where it is none of the known ones."""
    try:
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if tokenizer["model"]["type"] != "BPE":
        return None
    first = tokenizer["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    names = [step.get("type") for step in steps]
    if names == ["ByteLevel"]:
        return "gpt-2"
    if names == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if names == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"].get("Regex"))
        return "llama-bpe" if r"\p{N}{1,3}" in pattern else "qwen2" if r"|\p{N}|" in pattern else None
    return None


def write(pruned: PrunedModel, directory: Path) -> int:
    """Write `model.gguf`; returns the bytes of the weights."""
    fields, blocks = pruned.fields, pruned.block_configs
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    kept = [not block["attention"]["no_op"] for block in blocks]
    writer = gguf.GGUFWriter(directory / FILE, "deci")
    writer.add_block_count(len(blocks))
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_head_count([heads if one else 0 for one in kept])
    writer.add_head_count_kv([kv_heads if one else 0 for one in kept])
    writer.add_feed_forward_length([pruned.ffn_size(index) or EMPTY_FFN for index in range(len(blocks))])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((fields.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_vocab_size(fields["vocab_size"])
    dtype = next(iter(pruned.tensors.values())).dtype
    writer.add_file_type(KINDS[dtype][1])
    _add_tokenizer(writer, pruned.companions, fields["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(blocks))
    written = 0
    for name, tensor in [*pruned.tensors.items(), *_empty_ffns(pruned, dtype)]:
        if ".q_proj." in name or ".k_proj." in name:
            tensor = _interleaved(tensor, heads if ".q_proj." in name else kv_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise KeyError(f"no place for {name} in a deci file")
        data = tensor.float().contiguous().numpy()
        kind = KINDS[dtype][0] if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        raw = data.astype(numpy.float16) if kind == gguf.GGMLQuantizationType.F16 else gguf.quantize(data, kind)
        writer.add_tensor(stored, raw, raw_dtype=kind)
        written += raw.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a projection to queries or keys with both halves of every rotary pair side by side."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _empty_ffns(pruned: PrunedModel, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """FFNs that add nothing, for blocks that lost theirs."""
    width, tensors = pruned.fields["hidden_size"], []
    for index in range(len(pruned.block_configs)):
        if pruned.ffn_size(index) == 0:
            place = f"{pruned.family.blocks}.{index}"
            tensors.append((f"{place}.{pruned.family.ffn_norm}.weight", torch.ones(width, dtype=dtype)))
            for name, shape in (("gate_proj", (EMPTY_FFN, width)), ("up_proj", (EMPTY_FFN, width)),
                                ("down_proj", (width, EMPTY_FFN))):  # fmt: skip
                tensors.append((f"{place}.{pruned.family.ffn}.{name}.weight", torch.zeros(shape, dtype=dtype)))
    return tensors


def _add_tokenizer(writer: Any, directory: Path, size: int) -> None:
    """Vocabulary, merges, special tokens and chat template."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        index, special = added["id"], added["special"]
        tokens[index], types[index] = (
            added["content"],
            gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED,
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(directory))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    gguf.SpecialVocab(directory, load_merges=False, n_vocab=size).add_to_gguf(writer, quiet=True)
