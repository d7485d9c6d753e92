"""The `shoal` format: the base family's checkpoint with `block_configs`; needs this package to be read.

Where no weight of the dense model changes, its files are linked or copied as they are and one more holds what is added.
"""

from pathlib import Path

from safetensors.torch import save_file

from pruning.export.copying import write_copied
from pruning.export.formats import PrunedModel, Untouched
from pruning.export.writing import write_weights
from pruning.models.configuration import config_class
from pruning.models.weight_files import ADDED, INDEX, index_with, share


def refusal(pruned: PrunedModel) -> str | None:
    """It holds every pruned model."""
    return None


def write(pruned: PrunedModel, directory: Path) -> int:
    """Write configuration and weights; returns the bytes of the weights."""
    untouched = pruned.untouched if pruned.untouched is not None and pruned.untouched.keeps_dtype else None
    fields = pruned.fields if untouched is None else {**pruned.fields, "dtype": untouched.dtype}
    config = config_class(pruned.family)(**fields, block_configs=pruned.block_configs)
    config.architectures = [pruned.family.architecture]
    config.save_pretrained(directory)
    if pruned.copied is not None:
        return write_copied(pruned.copied, directory)
    if untouched is None:
        return write_weights(pruned.tensors, directory)
    return _share_weights(pruned, untouched, directory)


def _share_weights(pruned: PrunedModel, untouched: Untouched, directory: Path) -> int:
    added = pruned.added()
    sizes = {name: tensor.nbytes for name, tensor in added.items()}
    share(untouched.base, directory)
    if added:
        save_file({name: tensor.contiguous() for name, tensor in added.items()}, directory / ADDED, {"format": "pt"})
    (directory / INDEX).write_bytes(index_with(untouched.base, sizes))
    return untouched.base.bytes + sum(sizes.values())
