"""A checkpoint as the model to prune: what earlier runs made of it. Needs no torch to find out.

Where earlier runs only limited layers, the dense model is in the checkpoint: it is loaded as it was, and their limits
beside it. Else the checkpoint itself is what further sublayers are taken out of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.errors import ModelError
from pruning.families import FAMILIES, Family, places
from pruning.models.checkpoint import CHAIN_VERSION, Manifest, verify
from pruning.plan import KINDS, Kind, Sublayer
from pruning.variants import FUSED, REMOVED, VARIANTS, of_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.variants.base import Emulation

PREFIX = "depth_pruned_"


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier runs made of a model.

    Attributes:
        manifest: Of the checkpoint.
        entries: Changed sublayer, numbered as in the checkpoint -> its entry in `config.json`.
        blocks: Number in the dense model of each block that is left.
        whole: Whether all of the dense model is in the checkpoint.
    """

    manifest: Manifest
    entries: Mapping[Sublayer, Mapping[str, Any]]
    blocks: Sequence[int]
    whole: bool

    @property
    def kinds(self) -> dict[Sublayer, str]:
        """Changed sublayer -> its kind as in a plan."""
        return {sublayer: self.manifest.removed[str(self.in_dense(sublayer))] for sublayer in self.entries}

    @property
    def window(self) -> int | None:
        """The usual window of limited layers, positions; None where none is limited."""
        sizes = [found.positions(entry) for entry in self.entries.values() if (found := of_entry(entry)) is not None]
        known = [size for size in sizes if size is not None]
        usual = self.manifest.recipe.get("window")
        return (int(usual) if usual else known[0]) if known else None

    def in_dense(self, sublayer: Sublayer) -> Sublayer:
        """A sublayer by its number in the dense model."""
        return Sublayer(self.blocks[sublayer.block], sublayer.kind)

    def changed(self, kinds: Sequence[Kind]) -> list[int]:
        """Blocks in which a sublayer of one of these kinds is not what it was."""
        return sorted({sublayer.block for sublayer in self.entries if sublayer.kind in kinds})

    @property
    def chain(self) -> list[dict[str, Any]]:
        """The steps so far, oldest first: recipe, version, what became of which sublayer, figures, and digest."""
        made = self.manifest
        step = {
            "shoal_version": made.shoal_version, "recipe": made.recipe, "removed": made.removed,
            "quality": made.quality, "digest": made.digest,
        }  # fmt: skip
        return [*made.chain, step]


def earlier_of(directory: Path, fields: Mapping[str, Any]) -> Earlier:
    """Read a checkpoint's manifest and entries, and check every file of it.

    Raises:
        CheckpointError: It is damaged.
        ModelError: Nothing can be built on what is in it.
    """
    manifest = verify(directory)
    entries: dict[Sublayer, Mapping[str, Any]] = {}
    in_place, limited = True, False
    for index, block in enumerate(fields["block_configs"]):
        for kind in KINDS:
            entry, sublayer = block[kind], Sublayer(index, kind)
            found = of_entry(entry)
            if found is None and not entry["no_op"]:
                in_place = in_place and "intermediate_size" not in entry
                continue
            entries[sublayer] = entry
            if found is not None and _reads_others(entry):
                raise ModelError(
                    f"{directory}: {found.title} of {sublayer} reads other layers, so nothing more can be taken out; "
                    "prune the dense model again"
                )
            if found is not None and found.final:
                raise ModelError(f"{directory} holds {found.title} of {sublayer}, so nothing more can be taken out; "
                                 "prune the dense model again")  # fmt: skip
            in_place = in_place and found is not None and found.in_place and not found.changes_weights
            limited = limited or (found is not None and found.positions(entry) is not None)
    gone = {name for name, kind in manifest.removed.items() if kind in (REMOVED, FUSED)}
    dense = range(manifest.num_blocks)
    blocks = [block for block in dense if not all(f"{kind}.{block}" in gone for kind in KINDS)]
    if len(blocks) != len(fields["block_configs"]) or (limited and not in_place):
        raise ModelError(f"{directory}: layers of several kinds were changed in it; prune the dense model again")
    known = set(manifest.removed)
    if {str(Sublayer(blocks[each.block], each.kind)) for each in entries} - known:
        raise ModelError(f"{directory}: its config.json and its pruning.json differ; export it again")
    return Earlier(manifest, entries, blocks, in_place and len(blocks) == len(dense))


def _reads_others(entry: Mapping[str, Any]) -> bool:
    """Whether what an entry names reads other layers, or borrows from another block."""
    spec = entry.get("emulation") or {}
    borrows = any(each.entry == spec.get("kind") and each.unit == "block" for each in VARIANTS.values())
    return borrows or bool(spec.get("sources"))


def family_in(fields: Mapping[str, Any]) -> Family | None:
    """The family of the dense model that a checkpoint's configuration names; None where it is no checkpoint."""
    return FAMILIES.get(str(fields["model_type"]).removeprefix(PREFIX)) if is_checkpoint(fields) else None


def is_checkpoint(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a checkpoint of ours."""
    return str(fields["model_type"]).startswith(PREFIX) and isinstance(fields.get("block_configs"), list)


def dense_fields(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The configuration of the dense model in a checkpoint that holds all of it."""
    kept = {name: value for name, value in fields.items() if name not in ("block_configs", "auto_map")}
    return kept | {"model_type": family.model_type, "architectures": [f"{family.name}ForCausalLM"]}


def emulations_of(
    earlier: Earlier, directory: Path, model: "PreTrainedModel", family: Family
) -> "dict[Sublayer, Emulation]":
    """The modules that limit layers of the dense model in a checkpoint, with their tensors."""
    from safetensors import safe_open

    from pruning.models.modeling import blocks_of

    made: dict[Sublayer, Emulation] = {}
    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: (path, name) for name in file.keys()}  # noqa: SIM118
    for sublayer, entry in earlier.entries.items():
        found = of_entry(entry)
        assert found is not None
        module = places(family, sublayer.kind)[0]
        emulation = found.build(entry, getattr(blocks_of(model, family)[sublayer.block], module), model.config, None)
        for name, parameter in emulation.named_parameters():
            path, full = tensors[f"{family.blocks}.{sublayer.block}.{module}.{name}"]
            with safe_open(path, "pt") as file:
                parameter.data = file.get_tensor(full).to(model.device, model.dtype)
            parameter.requires_grad_(False)
        made[sublayer] = emulation
    return made


def continued(manifest: Manifest, earlier: Earlier) -> Manifest:
    """The manifest of a further step: of the first base, numbered as the dense model, with the steps before it."""
    old = earlier.manifest
    sizes = dict(manifest.sizes)
    if not earlier.whole:
        layer = sizes["kv_per_token_dense"] // manifest.num_blocks
        gone = len([each for each in earlier.entries if each.kind == "attention"]) * layer
        sizes["weights_dense"] = old.sizes["weights_dense"]
        sizes["kv_per_token_dense"] = layer * old.num_blocks
        sizes["kv_request_dense"] = layer * old.num_blocks * sizes["context"]
        sizes["kv_per_token"] -= gone
        sizes["kv_request"] -= gone * sizes["context"]
    renumbered = {}
    for name, kind in manifest.removed.items():
        what, _, block = name.partition(".")
        renumbered[f"{what}.{earlier.blocks[int(block)]}"] = kind
    return manifest.model_copy(
        update={
            "format_version": CHAIN_VERSION,
            "base": manifest.base | {"model": old.base["model"], "weight_hash": old.base["weight_hash"]},
            "num_blocks": old.num_blocks,
            "removed": dict(sorted({**old.removed, **renumbered}.items(), key=_position)),
            "sizes": sizes,
            "chain": earlier.chain,
        }
    )


def _position(item: tuple[str, str]) -> tuple[int, str]:
    what, _, block = item[0].partition(".")
    return int(block), what
