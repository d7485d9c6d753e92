"""Fit attention over the KV cache of a kept layer in place of a removed one, in closed form (`kv-share`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.plan import Sublayer
from pruning.regression import (
    RIDGES,
    Affine,
    HeldOutMoments,
    NormalEquations,
    fit_low_rank,
    fit_partly_low_rank,
    held_out,
    token_weights,
)
from pruning.variants.kv_share import KVShareEmulation
from pruning.variants.taps import Tap, rms_normalise

if TYPE_CHECKING:
    from pruning.forward.blocks import Taps
    from pruning.forward.evaluator import Evaluator
    from pruning.forward.walk import Seen

RIDGE = 0.1  # of a feature's variance, for the query map
STEPS = 12  # of conjugate gradients
LEAST_GAIN = 0.01  # of held-out error, for another refinement


@dataclass(frozen=True, slots=True)
class _Rows:
    """One batch of windows at a removed layer; float32.

    Attributes:
        inputs: rms(x) of the pruned stream and a 1, [b, T, D + 1].
        queries: Of the removed layer in the dense model, rotated, [b, H, T, d].
        own_keys: Its keys, the same, one for every query head.
        keys: The source's keys in the pruned model, rotated, [b, H, T, d].
        values: Its values.
        mask: 0 where a token may look, else very low, [T, T] or [b, 1, T, T].
        rotation: Cosines and sines, [b, T, d].
        update: To reproduce, [b, T, D].
        weights: Of every token, [b, T].
        fitted: Weights without those of windows held out.
    """

    inputs: Tensor
    queries: Tensor
    own_keys: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor
    rotation: tuple[Tensor, Tensor]
    update: Tensor
    weights: Tensor
    fitted: Tensor


def _look(rows: _Rows, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention probabilities [b, H, T, T]."""
    return torch.softmax(queries @ keys.transpose(-1, -2) * scale + rows.mask, -1)


def _centred(probabilities: Tensor, values: Tensor) -> Tensor:
    """p (v - sum p v) over what is looked at: the derivative of a softmax applied to v, [b, H, T, T]."""
    weighted = probabilities * values
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


class _Sharing:
    """Least squares for the query map of one removed layer.

    Args:
        attention: The removed layer's module, for its rotation and scale.
        batches: What it is fitted on.
        ridge: Penalty of a row of the query map, as a share of the weighted square of its feature.
        steps: Of conjugate gradients.
        half: Whether their products are formed in bfloat16.
    """

    def __init__(
        self, attention: nn.Module, tap: Tap, batches: list[_Rows], ridge: float, steps: int, half: bool
    ) -> None:
        self.tap, self.batches, self.steps, self.half = tap, batches, steps, half
        self.size = batches[0].update.shape[-1]
        self.scale = float(attention.scaling)
        self.heads, self.head_dim = batches[0].queries.shape[1], batches[0].queries.shape[-1]
        self.total = sum(float(rows.fitted.sum()) for rows in batches)
        gram = sum(self._weighted(rows).T @ rows.inputs.flatten(0, 1) for rows in batches).double()
        diagonal = gram.diagonal()
        self.penalty = (ridge * diagonal + 1e-7 * diagonal.mean()).float()
        self.inverse = torch.linalg.inv(gram + torch.diag(self.penalty.double())).float()

    def _weighted(self, rows: _Rows) -> Tensor:
        return (rows.inputs * (rows.fitted / self.total)[..., None]).flatten(0, 1)

    def queries(self, rows: _Rows, matrix: Tensor) -> Tensor:
        """Rotated queries [b, H, T, d] of a query map [D + 1, H d]."""
        flat = (rows.inputs @ matrix).unflatten(-1, (self.heads, self.head_dim))
        return self.tap.rotate(flat.transpose(1, 2), rows.rotation)

    def pulled_back(self, rows: _Rows, gradient: Tensor) -> Tensor:
        """Gradient by the query map [D + 1, H d] of one by rotated queries [b, H, T, d]."""
        cosines, sines = rows.rotation
        plain = self.tap.rotate(gradient, (cosines, -sines)).transpose(1, 2).flatten(2)
        return self._weighted(rows).T @ plain.flatten(0, 1)

    def solve(self, apply: Callable[[int, Tensor], Tensor], rhs: Tensor, curvature: Tensor, *, each: bool) -> Tensor:
        """Minimise by preconditioned conjugate gradients.

        Args:
            apply: Number of a batch and rotated queries -> gradient by them, linear and positive.
            rhs: [D + 1, H d].
            curvature: Of one query coordinate, [H d]; scales the penalty.
            each: Every head is a problem of its own.
        """
        shape = (len(rhs), self.heads, self.head_dim)

        def operator(matrix: Tensor) -> Tensor:
            out = self.penalty[:, None] * matrix * curvature
            with torch.autocast(rhs.device.type, torch.bfloat16, enabled=self.half):
                for number, rows in enumerate(self.batches):
                    out = out + self.pulled_back(rows, apply(number, self.queries(rows, matrix)))
            return out

        def dot(a: Tensor, b: Tensor) -> Tensor:
            parts = (a * b).view(shape).sum((0, 2))
            parts = parts if each else parts.sum().expand(self.heads)
            return parts.clamp_min(1e-30).repeat_interleave(self.head_dim)

        result, residual = torch.zeros_like(rhs), rhs
        direction = step = self.inverse @ residual
        size = dot(residual, step)
        for _ in range(self.steps):
            image = operator(direction)
            length = size / dot(direction, image)
            result, residual = result + length * direction, residual - length * image
            step = self.inverse @ residual
            new = dot(residual, step)
            direction, size = step + new / size * direction, new
        return result

    def match_logits(self) -> Tensor:
        """The query map [D + 1, H d] whose logits are nearest to the dense layer's, weighted by its probabilities.

        Minimises sum_t w_t Var_{s ~ p_t}(q_t k_s - a_ts), p and a the dense layer's probabilities and logits: twice
        the divergence KL(p || p') to second order.
        """
        rhs, curvature = torch.zeros(()), torch.zeros(())
        looks = []
        for rows in self.batches:
            wanted = rows.queries @ rows.own_keys.transpose(-1, -2) * self.scale
            look = torch.softmax(wanted + rows.mask, -1)
            looks.append(look)
            rhs = rhs + self.pulled_back(rows, _centred(look, wanted) @ rows.keys * self.scale)
            spread = (look @ rows.keys.square()) - (look @ rows.keys).square()
            share = (rows.fitted / self.total)[:, None, :, None]
            curvature = curvature + (spread * share).sum((0, 2)).mean(-1) * self.scale**2

        def apply(number: int, queries: Tensor) -> Tensor:
            keys = self.batches[number].keys
            return _centred(looks[number], queries @ keys.transpose(-1, -2) * self.scale) @ keys * self.scale

        return self.solve(apply, rhs, curvature.repeat_interleave(self.head_dim), each=True)

    def contexts(self, rows: _Rows, matrix: Tensor) -> Tensor:
        """Head contexts [b, T, H d] under a query map."""
        looks = _look(rows, self.queries(rows, matrix), rows.keys, self.scale)
        return (looks @ rows.values).transpose(1, 2).flatten(2)

    def features(self, rows: _Rows, matrix: Tensor) -> Tensor:
        """What the output map reads: rms(x) and head contexts, [b, T, D + H d]."""
        return torch.cat([rows.inputs[..., :-1], self.contexts(rows, matrix)], -1)

    def moments(self, matrix: Tensor) -> HeldOutMoments:
        """Normal equations of the output map under a query map."""
        moments = HeldOutMoments.zeros(matrix.shape[1] + self.size, self.size)
        first = 0
        for rows in self.batches:
            moments.add_windows(first, self.features(rows, matrix), rows.update, rows.weights)
            first += len(rows.update)
        return moments

    def match_update(self, matrix: Tensor, output: Affine) -> Tensor:
        """A Gauss-Newton step of the query map towards the update itself, the output map held.

        Minimises sum_t w_t ||u_t - o(c_t) - dc_t O||^2 over the change of the query map, dc linearised in it.
        """
        onto = output.matrix[-matrix.shape[1] :].float().view(self.heads, self.head_dim, -1)
        whole, bias = output.matrix.float(), output.bias.float()
        looks = [_look(rows, self.queries(rows, matrix), rows.keys, self.scale) for rows in self.batches]

        def back(number: int, gap: Tensor) -> Tensor:
            rows = self.batches[number]
            pulled = torch.einsum("btm,hdm->bhtd", gap, onto) @ rows.values.transpose(-1, -2)
            return _centred(looks[number], pulled) @ rows.keys * self.scale

        def apply(number: int, queries: Tensor) -> Tensor:
            rows = self.batches[number]
            change = queries @ rows.keys.transpose(-1, -2) * self.scale
            moved = _centred(looks[number], change) @ rows.values
            return back(number, torch.einsum("bhtd,hdm->btm", moved, onto))

        rhs = torch.zeros(())
        for number, rows in enumerate(self.batches):
            gap = rows.update - self.features(rows, matrix) @ whole - bias
            rhs = rhs + self.pulled_back(rows, back(number, gap))
        like = self.batches[0].queries
        probe = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
        curvature = (probe * apply(0, probe)).mean().clamp_min(1e-12).expand(matrix.shape[1])
        step = self.solve(apply, rhs, curvature, each=False)
        return min((matrix + length * step for length in (1.0, 0.5, 0.0)), key=lambda m: self.error(m, output))

    def error(self, matrix: Tensor, output: Affine) -> float:
        """Weighted squared error of the update over the windows that are fitted on."""
        whole, bias = output.matrix.float(), output.bias.float()
        total = 0.0
        for rows in self.batches:
            gap = rows.update - self.features(rows, matrix) @ whole - bias
            total += float((gap.square().sum(-1) * rows.fitted).sum())
        return total


def _rows(
    evaluator: "Evaluator", sublayer: Sublayer, source: int, before: Tensor, inputs: Tensor, target: Tensor,
    arguments: Mapping[str, Any], taps: "Taps", first: int,
) -> tuple[_Rows, Tap]:  # fmt: skip
    block = evaluator.blocks[sublayer.block]
    attention = block.get_submodule(evaluator.family.attention)
    own: Taps = {}
    evaluator.run_and_tap(sublayer, before, arguments, None, own)
    tap, read = own[sublayer.block], taps[source]
    assert tap.keys is not None
    assert read.keys is not None
    assert read.values is not None
    queries = attention.q_proj(block.get_submodule(evaluator.family.attention_norm)(before))
    queries = queries.unflatten(-1, (-1, attention.head_dim))
    queries = getattr(attention, "q_norm", nn.Identity())(queries).transpose(1, 2)
    rotation = arguments["position_embeddings"]
    groups = queries.shape[1] // read.keys.shape[1]
    length, device = before.shape[1], before.device
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor):
        mask = torch.full((length, length), -1e30, device=device).triu(1)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -1e30)
    normed = rms_normalise(inputs.float())
    weights = token_weights(target).view(target.shape[:-1]).float()
    held = held_out(first, len(inputs)).to(device)
    rows = _Rows(
        inputs=torch.cat([normed, torch.ones_like(normed[..., :1])], -1),
        queries=tap.rotate(queries, rotation).float(),
        own_keys=tap.keys.float().repeat_interleave(groups, 1),
        keys=read.keys.float().repeat_interleave(groups, 1),
        values=read.values.float().repeat_interleave(groups, 1),
        mask=mask.float().clamp_min(-1e30),
        rotation=(rotation[0].float(), rotation[1].float()),
        update=(target.float() - inputs.float()) / evaluator.family.scale(evaluator.model.config),
        weights=weights,
        fitted=weights * ~held[:, None],
    )
    return rows, tap


@torch.no_grad()
def fit_kv_share(
    evaluator: "Evaluator",
    sublayer: Sublayer,
    source: int,
    seen: "Seen",
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    taps: "Sequence[Taps]",
    rank: int,
    *,
    full: bool,
    refinements: int = 2,
    ridge: float | None = None,
    steps: int | None = None,
) -> KVShareEmulation:
    """Fit what attends to another layer's KV cache in place of a removed attention sublayer.

    The query map is first fitted to the dense layer's attention logits, the output map then to the update by ridge
    regression on [contexts, rms(x)]. Gauss-Newton steps of the query map towards the update follow, each a
    least-squares problem, with the output map fitted anew, as long as the error on held-out windows falls.

    Args:
        evaluator: Of the dense model.
        sublayer: Removed attention.
        source: Block before it whose cache is read.
        seen: What the sublayer reads in the dense model.
        inputs: The pruned stream before it, batches of [b, T, D].
        targets: The dense stream after it, the same.
        taps: With the source's keys and values in the pruned model, for each batch.
        rank: Of the own input's map; of all maps where they are not full.
        full: Whether query and output maps are full matrices.
        refinements: Gauss-Newton steps at most.
        ridge: Penalty of the query map, as a share of each feature's weighted square.
        steps: Of conjugate gradients in every least-squares problem.

    Source: inferred throughout; cross-layer KV sharing is arXiv 2405.12981, with training. The logit objective is the
        second-order form of KL(p || p'), the refinement a layer-wise reconstruction as in arXiv 2301.00774.
    """
    device = inputs[0].device.type
    half = inputs[0].dtype == torch.bfloat16 or torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):  # moments need float32; `_Sharing.solve` does not
        batches: list[_Rows] = []
        first = 0
        for stream, x, target, given, each in zip(seen.streams, inputs, targets, seen.arguments, taps, strict=True):
            rows, tap = _rows(evaluator, sublayer, source, stream, x, target, given, each, first)
            batches.append(rows)
            first += len(x)
        attention = evaluator.blocks[sublayer.block].get_submodule(evaluator.family.attention)
        sharing = _Sharing(attention, tap, batches, ridge or RIDGE, steps or STEPS, half=half)
        matrix = sharing.match_logits()
        moments = sharing.moments(matrix)
        output, penalty, error = _best(moments)
        for _ in range(refinements):
            finer = sharing.match_update(matrix, output)
            found = sharing.moments(finer)
            candidate = _best(found)
            if candidate[2] >= error:
                break
            enough = candidate[2] > error * (1 - LEAST_GAIN)
            matrix, moments, (output, penalty, error) = finer, found, candidate
            if enough:
                break
        if full:
            return _full_module(sharing, matrix, moments, penalty, source, rank, inputs[0])
        return _low_rank_module(sharing, matrix, source, rank, inputs[0])


def _best(moments: HeldOutMoments) -> tuple[Affine, float, float]:
    """The ridge map of least held-out error, fitted on what is not held out; its penalty; that error."""
    size = len(moments.train.y_sum)
    if not moments.held_out.weight:
        return fit_low_rank(moments.train, size, 1e-2), 1e-2, 0.0
    found = []
    for ridge in RIDGES:
        output = fit_low_rank(moments.train, size, ridge)
        found.append((output, ridge, moments.held_out.error(output.matrix, output.bias)))
    return min(found, key=lambda one: one[2])


def _scaled(moments: NormalEquations, scale: Tensor) -> NormalEquations:
    """Moments of features multiplied by `scale` [D]."""
    return NormalEquations(
        moments.weight, moments.x_sum * scale, moments.y_sum, moments.xx * scale * scale[:, None],
        moments.xy * scale[:, None], moments.yy,
    )  # fmt: skip


def _load(module: KVShareEmulation, tensors: Mapping[str, Tensor], like: Tensor) -> KVShareEmulation:
    state = {name: tensor.to(like.device, like.dtype).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _full_module(
    sharing: _Sharing, matrix: Tensor, moments: HeldOutMoments, ridge: float, source: int, rank: int, like: Tensor
) -> KVShareEmulation:
    """Full query and output maps; the map of the own input of rank r."""
    whole = moments.whole()
    spread = whole.xx.diagonal() - whole.x_sum.square() / whole.weight
    scale = (spread + 1e-9 * spread.mean()).rsqrt()
    found = fit_partly_low_rank(_scaled(whole, scale), sharing.size, rank, ridge)
    with torch.device("meta"):
        module = KVShareEmulation(sharing.size, sharing.heads, sharing.head_dim, (source,), 0, rank)
    tensors = {
        "query.weight": matrix[:-1].T,
        "query.bias": matrix[-1],
        "context.weight": (found.free * scale[sharing.size :, None]).T,
        "down.weight": (found.low.down * scale[: sharing.size, None]).T,
        "up.weight": found.low.up.T,
        "up.bias": found.low.bias,
    }
    return _load(module, tensors, like)


def _low_rank_module(sharing: _Sharing, matrix: Tensor, source: int, rank: int, like: Tensor) -> KVShareEmulation:
    """Query and output maps of rank r: the query map cut in prediction space, the output map fitted after it."""
    gram = sum(sharing._weighted(rows).T @ rows.inputs.flatten(0, 1) for rows in sharing.batches).double()
    mean = gram[-1, :-1]
    wide = matrix.double()
    centred = gram[:-1, :-1] - torch.outer(mean, mean)
    _, vectors = torch.linalg.eigh(wide[:-1].T @ centred @ wide[:-1])
    leading = vectors[:, -rank:]
    down, up = wide[:-1] @ leading, leading.T
    bias = wide[-1] + mean @ (wide[:-1] - down @ up)
    cut = torch.cat([down @ up, bias[None]]).to(matrix)
    output = sharing.moments(cut).low_rank(rank)
    with torch.device("meta"):
        module = KVShareEmulation(sharing.size, sharing.heads, sharing.head_dim, (source,), rank, rank)
    tensors = {
        "query_down.weight": down.T,
        "query.weight": up.T,
        "query.bias": bias,
        "context.weight": output.down[sharing.size :].T,
        "down.weight": output.down[: sharing.size].T,
        "up.weight": output.up.T,
        "up.bias": output.bias,
    }
    return _load(module, tensors, like)
