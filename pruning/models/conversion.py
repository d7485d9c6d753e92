"""Convert a GGUF file to a Hugging Face directory."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pruning.errors import ModelError
from pruning.families import family_of
from pruning.workdir import atomic_directory


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file's weights, as float32, and its tokenizer to a directory.

    Raises:
        ModelError: The file cannot be read or its family is not supported.
    """
    try:
        arguments = {"gguf_file": gguf.name}
        config = AutoConfig.from_pretrained(gguf.parent, **arguments)
        family_of(config)
        dense = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
        raise ModelError(f"cannot read GGUF file {gguf}: {' '.join(str(error).split())}") from error
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = type(dense.config)(**fields)
    plain.dtype = torch.float32
    with torch.device("meta"):
        model = type(dense)(plain)
    model.load_state_dict(dense.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(plain)
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
