"""What every kind of variant offers, and what a pipeline stage offers to those that read other layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from server.engine.vllm import sum_over_ranks


class Emulation(nn.Module):
    """Makes the update of a removed sublayer.

    Attributes:
        hidden_size: D.
        reads_norm: Whether it reads the stream through a norm without weights; else what its block hands it.
    """

    hidden_size: int
    reads_norm: bool = True

    def connect(self, stage: "Stage", block: int, spec: Mapping[str, Any]) -> None:
        """Note what it reads of other blocks; called once all blocks of the pipeline stage are built."""

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Update [tokens, D] of hidden [tokens, D] at positions [tokens] (None: in the place of an FFN)."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class StandInVariant:
    """A kind that takes the place of a removed sublayer.

    Attributes:
        build: Gives the module for (`emulation` entry, D, whether blocks carry (update, residual)).
        reads: What it reads of the blocks in `sources`, in words.
    """

    build: Callable[[Mapping[str, Any], int, bool], Emulation]
    reads: str = "attention output"


class ChangeVariant(Protocol):
    """A kind that changes an attention layer which keeps its own cache."""

    def attention_class(self, spec: Mapping[str, Any]) -> Callable[..., nn.Module]:
        """What a block constructs in the place of vLLM's `Attention`."""

    def prepare(self, module: nn.Module, spec: Mapping[str, Any]) -> None:
        """Complete the attention module, which holds that `Attention` as `attn`, once it is built."""


class FFNChangeVariant(Protocol):
    """A kind that changes an FFN which keeps its weights.

    Attributes:
        eager: Whether its shapes differ from step to step, which neither CUDA graphs nor torch.compile can hold.
    """

    eager: bool

    def prepare(
        self, ffn: nn.Module, attention: nn.Module, spec: Mapping[str, Any], hidden_size: int, share: float
    ) -> None:
        """Complete an FFN once its block is built.

        Args:
            ffn: It.
            attention: What its block holds as attention, which is given `positions`.
            spec: What the checkpoint's entry says.
            hidden_size: D.
            share: Of a constant that this rank adds, where the block sums over ranks.
        """


class Source:
    """What one kept attention layer hands on in the forward under way; a forward hook on that layer.

    Inside a compiled graph the tensor goes from the layer to its readers as any other; the last reader lets it go, so
    that the forward ends as it began.

    Args:
        partial: Whether the layer leaves the sum over tensor-parallel ranks to its block.
    """

    def __init__(self, partial: bool) -> None:
        self.partial = partial
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        """Note the output [tokens, D]; the signature is that of a forward hook."""
        self.output = sum_over_ranks(output) if self.partial else output


class Stage:
    """The blocks of one pipeline stage, as those see them that read other layers.

    Args:
        blocks: All of the model, of which this stage holds some.
        attention: Attribute of a block that holds its attention module.
        partial: Whether attention leaves the sum over tensor-parallel ranks to its block.
    """

    def __init__(self, blocks: nn.ModuleList, attention: str, *, partial: bool) -> None:
        self.blocks, self.place, self.partial = blocks, attention, partial
        self.sources: dict[int, Source] = {}
        self.last_readers: dict[int, list[Source]] = {}

    def attention(self, block: int) -> Any:
        """The attention module of a block."""
        return getattr(self.blocks[block], self.place)

    def output_of(self, block: int, done: list[Source]) -> Source:
        """What a block's attention puts out.

        Args:
            block: Which.
            done: List of the reader; ends up holding the sources that nobody reads after it.
        """
        if block not in self.sources:
            self.sources[block] = Source(self.partial)
            self.attention(block).register_forward_hook(self.sources[block])
        self.last_readers[block] = done
        return self.sources[block]

    def close(self) -> None:
        """Tell the last reader of each source that it is."""
        for block, done in self.last_readers.items():
            done.append(self.sources[block])
