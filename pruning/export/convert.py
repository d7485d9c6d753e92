"""Write a checkpoint again in another export format, from its files alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pruning.console import Reporter
from pruning.errors import CheckpointError
from pruning.export.formats import PrunedModel, format_named
from pruning.export.formats.nemotron_nas import family_like, kept_or_not
from pruning.export.report import write_card
from pruning.export.untouched import untouched_in
from pruning.export.writing import copy_companions, fields_of
from pruning.families import FAMILIES, Family
from pruning.models.checkpoint import Manifest, verify, write_manifest
from pruning.models.configuration import base_config_class, config_class
from pruning.workdir import atomic_directory, check_free_space, check_output


def convert(directory: Path, to: str, output: Path, *, overwrite: bool, reporter: Reporter) -> Manifest:
    """Write a checkpoint in another format; the source stays as it is.

    Raises:
        UserError: The source is damaged, the format cannot hold it, or the output cannot be written.
    """
    form = format_named(to)
    manifest = verify(directory)
    pruned = replace(read_pruned(directory), untouched=None if form.weights else untouched_in(directory, manifest))
    if (reason := form.refusal(pruned)) is not None:
        raise CheckpointError(f"{directory} cannot become {to}: {reason}")
    if output.resolve() == directory.resolve():
        raise CheckpointError(f"{output} is the checkpoint to convert; choose another --output")
    check_output(output, overwrite)
    check_free_space(output, int(sum(t.numel() * t.element_size() for t in pruned.tensors.values()) * 1.05) + 2**24)
    with atomic_directory(output) as temporary:
        manifest.recipe["format"] = to
        manifest.sizes["weights"] = form.write(pruned, temporary)
        if form.weights:
            copy_companions(directory, temporary)
        write_card(temporary, manifest)
        write_manifest(temporary, manifest)
    reporter.say(f"wrote {output} as {to}: {manifest.sizes['weights'] / 2**20:.1f} MiB of weights")
    return verify(output)


def read_pruned(directory: Path) -> PrunedModel:
    """Read a checkpoint of any format that transformers' names describe; tensors are mapped from the files.

    Raises:
        CheckpointError: The configuration is none of ours, quantised or unreadable.
    """
    try:
        document = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        name = str(document.pop("model_type"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{directory} has no readable config.json; only directories of weights convert"
        ) from error
    if document.get("quantization_config"):
        raise CheckpointError(f"{directory} is quantised; convert first, quantise then")
    family, config, blocks = _described(directory, name, document)
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted(directory.glob("*.safetensors")):
            tensors |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return PrunedModel(family, fields_of(config), blocks, tensors, directory)


def _described(directory: Path, name: str, document: dict[str, Any]) -> tuple[Family, Any, list[dict[str, Any]]]:
    """Family, configuration and `block_configs` of a `config.json`."""
    blocks = document.pop("block_configs", None)
    for family in FAMILIES.values():
        if name == family.pruned_model_type and blocks is not None:
            return family, config_class(family)(**document), blocks
    kept = {"no_op": False, "emulation": None}
    if name == "nemotron-nas" and blocks is not None:
        family = FAMILIES[family_like(document)]
        config = base_config_class(family)(**document)
        return family, config, [kept_or_not(block, config.intermediate_size) for block in blocks]
    if name in FAMILIES:
        config = base_config_class(FAMILIES[name])(**document)
        return FAMILIES[name], config, [{"attention": kept, "ffn": kept} for _ in range(config.num_hidden_layers)]
    raise CheckpointError(f"{directory} is a {name}, which is no format of ours")
