"""`low_rank`, `linear` and `self_only`: affine maps of the token's own normalised stream."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.errors import RecipeError
from pruning.families import Family
from pruning.plan import Sublayer
from pruning.regression import Affine, HeldOutMoments, token_weights
from pruning.variants.base import Emulation, Job, Shape, Variant
from pruning.variants.taps import context_features, rms_normalise

if TYPE_CHECKING:
    from pruning.forward.evaluator import Evaluator


class LowRankEmulation(Emulation):
    """An affine map of rank r of the normalised residual stream: up(down(rms(x))) + bias."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Update [..., D] for the residual stream [..., D]."""
        return self.up(self.down(rms_normalise(hidden)))

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `emulation` entry."""
        return {"kind": "low_rank", "rank": self.down.out_features}


def moments_of(job: Job) -> HeldOutMoments:
    """Moments of what a map reads (the normalised stream, then its sources) and of the update to reproduce."""
    size = job.inputs[0].shape[-1]
    evaluator, first = job.evaluator, 0
    scale = evaluator.family.scale(evaluator.model.config)
    moments = HeldOutMoments.zeros(size * (1 + len(job.sources)), size)
    for x, target, each in zip(job.inputs, job.targets, job.taps, strict=True):
        update = (target.float() - x.float()) / scale
        outputs = [each[source].output for source in job.sources]
        features = context_features(evaluator.reads(job.sublayer, x, each), outputs)
        moments.add_windows(first, features, update, token_weights(target).view(target.shape[:-1]))
        first += len(target)
    return moments


def load_affine(module: nn.Module, affine: Affine, like: Tensor) -> None:
    """Give a module made on the meta device (`down`, `up`) an affine map's weights, in place."""
    tensors = {"down.weight": affine.down.T, "up.weight": affine.up.T, "up.bias": affine.bias}
    state = {name: tensor.to(like.device, like.dtype).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


def low_rank_module(affine: Affine, like: Tensor) -> LowRankEmulation:
    """The map as a module of the checkpoint."""
    with torch.device("meta"):
        module = LowRankEmulation(affine.up.shape[1], affine.down.shape[1])
    load_affine(module, affine, like)
    return module


class LowRank(Variant):
    """The kind: a map of rank r."""

    title = "the low_rank adapter"

    def fit(self, job: Job) -> LowRankEmulation:
        """Reduced-rank ridge regression of the update on the normalised stream."""
        return low_rank_module(moments_of(job).low_rank(job.rank), job.inputs[0])

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> LowRankEmulation:
        """The untrained module."""
        return LowRankEmulation(config.hidden_size, int(entry["emulation"]["rank"]))

    def weight_bytes(self, shape: Shape) -> int:
        """Two matrices and a bias."""
        return (2 * shape.rank + 1) * shape.hidden_size * shape.dtype_bytes

    def rank_when_fused(self, rank: int, hidden_size: int) -> int | None:
        """Its own rank."""
        return rank


class Linear(LowRank):
    """The kind: a map of full rank."""

    def fit(self, job: Job) -> LowRankEmulation:
        """Ridge regression."""
        return low_rank_module(moments_of(job).low_rank(job.inputs[0].shape[-1]), job.inputs[0])

    def weight_bytes(self, shape: Shape) -> int:
        """Two square matrices and a bias."""
        return (2 * shape.hidden_size + 1) * shape.hidden_size * shape.dtype_bytes

    def rank_when_fused(self, rank: int, hidden_size: int) -> int:
        """The whole rank."""
        return hidden_size


class SelfOnly(LowRank):
    """The kind: attention of every token to itself."""

    def check(self, family: Family, config: Any) -> None:
        """Refuse a family with a norm after attention."""
        if family.attention_post_norm:
            raise RecipeError("--emulation self-only is for attention without a norm after it; choose another")

    def fit(self, job: Job) -> LowRankEmulation:
        """Read the map off the weights."""
        return low_rank_module(self_attention(job.evaluator, job.sublayer), job.inputs[0])

    def weight_bytes(self, shape: Shape) -> int:
        """Two matrices of the rank of all KV heads, and a bias."""
        return (2 * shape.kv_heads * shape.head_dim + 1) * shape.hidden_size * shape.dtype_bytes

    def rank_when_fused(self, rank: int, hidden_size: int) -> None:
        """No unit carries it."""
        return None


def self_attention(evaluator: "Evaluator", sublayer: Sublayer) -> Affine:
    """Attention of every token to itself alone, W_o W_v of the normed input: an emulation that needs no data.

    The map is probed with windows of one token, where it is what attention does, so grouped heads, fused projections
    and biases need no cases of their own. Its rank is at most K heads · head dim. Exact under an RMSNorm; under a
    LayerNorm the standard deviation is taken for the root mean square.

    Raises:
        RecipeError: An FFN, or a family with a norm after attention or one for both sublayers: there is no such map.

    Source: inferred; an attention pattern that is the identity matrix.
    """
    family = evaluator.family
    before, after = family.norms(sublayer.kind)
    if sublayer.kind != "attention" or before is None or after is not None:
        raise RecipeError(f"{sublayer} cannot be emulated by self-only: it needs attention with a norm only before it")
    block = evaluator.blocks[sublayer.block]
    attention, norm = getattr(block, family.attention), getattr(block, before)
    size = evaluator.model.config.hidden_size
    token = evaluator.batches[0][:1, :1]
    with evaluator.residency.embedding():
        _, arguments = evaluator.embed(token)
    place = {"dtype": evaluator.model.dtype, "device": next(attention.parameters()).device}
    sign = torch.ones(size, **place)
    sign[1::2] = -1
    plus, minus = norm(sign[None])[0], norm(-sign[None])[0]
    gain, shift = (plus - minus) / 2 * sign, (plus + minus) / 2
    probes = torch.cat([torch.eye(size, **place), shift[None], torch.zeros(1, size, **place)])[:, None]
    out = attention(hidden_states=probes, **arguments[sublayer.block])[0][:, 0].double().cpu()
    zero = out[-1]
    matrix = gain.double().cpu()[:, None] * (out[:size] - zero)
    if float((norm(torch.ones(1, size, **place))[0] - shift).abs().max()) < 1e-4 * float(gain.abs().max()):
        matrix = matrix - matrix.mean(0)  # a LayerNorm takes the mean away
    left, values, right = torch.linalg.svd(matrix)
    rank = max(1, int((values > 1e-5 * values[0]).sum()))
    return Affine(left[:, :rank] * values[:rank], right[:rank], out[-2])


LOW_RANK, LINEAR, SELF_ONLY = LowRank(), Linear(), SelfOnly()
