"""The `shoal` format: the base family's checkpoint with `block_configs`; needs this package to be read."""

from pathlib import Path

from pruning.export.formats import PrunedModel
from pruning.export.writing import write_weights
from pruning.models.configuration import config_class


def refusal(pruned: PrunedModel) -> str | None:
    """It holds every pruned model."""
    return None


def write(pruned: PrunedModel, directory: Path) -> int:
    """Write configuration and weights; returns the bytes of the weights."""
    config = config_class(pruned.family)(**pruned.fields, block_configs=pruned.block_configs)
    config.architectures = [pruned.family.architecture]
    config.save_pretrained(directory)
    return write_weights(pruned.tensors, directory)
