"""A model of random weights in a known model's shape, written to disk block by block.

    python benchmarks/shapes.py llama-3.1-8b DIR --like smollm2-135m

Memory never holds more than one shard. The tokenizer is that of `--like`, whose ids all lie below the shape's
vocabulary. Weights are normal with the usual deviation of an initialised model, so losses say nothing; seconds, bytes
and places in the cache do.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pruning.console import Reporter
from pruning.export.writing import copy_companions
from pruning.models.finding import find_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "initializer_range": 0.02, "max_position_embeddings": 131072, "head_dim": 128, "vocab_size": 128256,
    "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.1-70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": LLAMA
    | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 32,
        "num_key_value_heads": 4, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def parts(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each shard: the embedding, each block, the head."""
    width, units = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    yield {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for block in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (units, width), "mlp.up_proj": (units, width), "mlp.down_proj": (width, units),
        }  # fmt: skip
        yield {f"model.layers.{block}.{name}.weight": shape for name, shape in shapes.items()}
    yield {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def tensor(shape: tuple[int, ...], config: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Random weights, bfloat16; norms are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16)
    return out.normal_(0.0, config["initializer_range"], generator=generator)


def write(config: dict[str, Any], directory: Path, companions: Path, seed: int = 0) -> int:
    """Write the model; returns its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards = list(parts(config))
    index, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {each: tensor(shape, config, generator) for each, shape in shapes.items()}
        save_file(tensors, directory / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(each.nbytes for each in tensors.values())
    metadata = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(metadata, indent=1))
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    copy_companions(companions, directory)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--like", default="smollm2-135m")
    options = parser.parse_args()
    companions = find_model(options.like, Reporter()).directory
    total = write(SHAPES[options.shape], options.directory, companions)
    print(f"{options.directory}: {total / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
