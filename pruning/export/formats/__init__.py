"""Export formats: one file each, all written from the same description of a pruned model.

    FORMATS["nemotron-nas"].write(pruned, directory)

A format that cannot hold a model says why: `FORMATS[name].refusal(pruned)`.
"""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.errors import RecipeError
from pruning.families import Family
from pruning.models.checkpoint import Manifest
from pruning.variants import of_entry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pruning.models.weight_files import WeightFiles
    from pruning.variants.base import Variant


@dataclass(frozen=True, slots=True)
class Untouched:
    """A dense directory of which a plan changes no weight.

    Attributes:
        base: Its weight files.
        hashes: SHA-256 of files there, by name, as far as they are known.
        dtype: Of its weights, as in `config.json`.
        keeps_dtype: Whether that is the dtype to store in.
        manifest: What `pruning.json` is going to say.
    """

    base: "WeightFiles"
    hashes: Mapping[str, str]
    dtype: str
    keeps_dtype: bool
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Copied:
    """A dense directory that most weights are taken from as they are, because they are in no memory.

    Attributes:
        base: Its weight files.
        hashes: SHA-256 of files there, by name, as far as they are known.
        names: Parameter name in the checkpoint -> name there.
        added: Name -> tensor of what is new or changed, in `dtype`; may be read from disk when asked for.
        dtype: Of all weights, as in `config.json`.
    """

    base: "WeightFiles"
    hashes: Mapping[str, str]
    names: Mapping[str, str]
    added: "Mapping[str, Tensor]"
    dtype: str


@dataclass(frozen=True, slots=True)
class PrunedModel:
    """A pruned model as data: what every format is written from.

    Attributes:
        family: Of the dense model.
        fields: Configuration of the dense family with the blocks that are left; JSON.
        block_configs: As in the checkpoint format, one entry for each block that is left.
        tensors: Parameter name -> tensor, names as in the checkpoint format; without the dense model's where its files
            serve as they are.
        companions: Directory with the tokenizer's files.
        untouched: The dense model, where none of its weights changes.
        copied: Where the other tensors are, where `tensors` are only the new and changed ones.
    """

    family: Family
    fields: Mapping[str, Any]
    block_configs: list[dict[str, Any]]
    tensors: "Mapping[str, Tensor]"
    companions: Path
    untouched: Untouched | None = None
    copied: Copied | None = None

    @classmethod
    def of(
        cls, model: "PreTrainedModel", family: Family, companions: Path, untouched: Untouched | None = None,
        copied: Copied | None = None,
    ) -> "PrunedModel":  # fmt: skip
        """A model that `apply_plan` has cut."""
        from pruning.export.writing import fields_of, state_dict
        from pruning.models.modeling import added_tensors, block_configs_of

        dtype = str(model.dtype).removeprefix("torch.") if copied is None else copied.dtype
        fields = fields_of(model.config) | {"dtype": dtype}
        if copied is not None:
            return cls(family, fields, block_configs_of(model, family), copied.added, companions, None, copied)
        shared = untouched is not None and untouched.keeps_dtype
        tensors = added_tensors(model, family) if shared else state_dict(model)
        return cls(family, fields, block_configs_of(model, family), tensors, companions, untouched)

    def added(self) -> "dict[str, Tensor]":
        """The tensors that the dense model does not have, where none of its weights changes."""
        assert self.untouched is not None
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.untouched.base.files}

    def variants(self) -> "dict[str, Variant]":
        """Sublayers that became a variant, such as `attention.4`, and which."""
        found = {
            f"{kind}.{index}": of_entry(block[kind])
            for index, block in enumerate(self.block_configs)
            for kind in ("attention", "ffn")
        }
        return {name: each for name, each in found.items() if each is not None}

    def ffn_size(self, block: int) -> int:
        """Units of a block's FFN; 0 where it is removed."""
        ffn = self.block_configs[block]["ffn"]
        return 0 if ffn["no_op"] else int(ffn.get("intermediate_size", self.fields["intermediate_size"]))


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table.

    Attributes:
        module: Module with `refusal(pruned) -> str | None` and `write(pruned, directory) -> int` (bytes of weights).
        help: Who reads it and what it can hold.
        adapters: Whether it can hold emulation adapters.
        weights: Whether it holds weights of the dense model, so that they may be changed ones.
        copies: Whether it can take weights from the dense model's files that are in no memory.
    """

    module: str
    help: str
    adapters: bool = False
    weights: bool = True
    copies: bool = False

    def refusal(self, pruned: PrunedModel) -> str | None:
        """Why the format cannot hold this model; None where it can."""
        if not self.adapters and (variants := pruned.variants()):
            name, found = next(iter(variants.items()))
            more = f" and {len(variants) - 1} more" if len(variants) > 1 else ""
            return f"{found.title} of {name}{more} {found.way_out}"
        return importlib.import_module(self.module).refusal(pruned)

    def write(self, pruned: PrunedModel, directory: Path) -> int:
        """Write configuration and weights; returns the bytes of the weights.

        Raises:
            NumberError: A weight is not finite; nothing is written.
        """
        from pruning.finite import check_tensors

        check_tensors(pruned.tensors.items(), "what would be written")
        return importlib.import_module(self.module).write(pruned, directory)


FORMATS: Mapping[str, Format] = {
    "shoal": Format(
        "pruning.export.formats.shoal", "prune-serve, and vLLM or transformers with this package", adapters=True,
        copies=True,
    ),
    "plan": Format(
        "pruning.export.formats.plan", "prune-serve DENSE --plan, for plans that change no weight: no weights in it",
        adapters=True, weights=False,
    ),
    "nemotron-nas": Format("pruning.export.formats.nemotron_nas", "stock vLLM with --trust-remote-code, no plugin"),
    "gguf": Format("pruning.export.formats.llama_cpp", "llama.cpp, by its deci architecture"),
    "llama": Format("pruning.export.formats.ordinary", "anything that reads the model's own family; no KV cache saved"),
}  # fmt: skip


def format_named(name: str) -> Format:
    """Look a format up.

    Raises:
        RecipeError: There is no such format.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"unknown format {name!r}{hint} (formats: {', '.join(FORMATS)})")
    return FORMATS[name]
