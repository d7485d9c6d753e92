"""What a subnetwork is judged by, from its final hidden states; logits exist only a tile at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pruning.families import Family

Objective = Literal["loss", "kl", "logits"]
CHUNK_TOKENS = 1024
CHUNK_WORDS = 2048  # logits of one tile stay in the processor's cache, which the whole vocabulary would not


class Head:
    """Final norm and output projection of a model.

    Args:
        model: Dense model.
        family: Where its parts are.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.norm: nn.Module = model.get_submodule(family.norm)
        self.projection: nn.Module = model.get_submodule(family.head)
        divisor, factor = (getattr(model.config, name, None) or 1.0 for name in ("logits_scaling", "logit_scale"))
        self.scaling = float(divisor) / float(factor)
        self.cap = getattr(model.config, "final_logit_softcapping", None)
        self._gram: Tensor | None = None

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Next-token cross-entropy of final hidden states.

        Args:
            hidden: What leaves the last block, [b, T, D].
            targets: int64 [b, T-1], the next tokens.

        Returns:
            float32 [b, T-1], nats.
        """
        rows = self._rows(hidden)
        return (self._normaliser(rows) - self._chosen(rows, targets.reshape(-1).to(rows.device))).view(targets.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states [b, T, D] at every position but the last, float32 [b (T-1), V], whole."""
        return self._shaped(self.projection(self._rows(hidden)).float())

    def normaliser(self, hidden: Tensor) -> Tensor:
        """log of the sum of exp(logit) over the vocabulary at every position but the last, float32 [b, T-1]."""
        return self._normaliser(self._rows(hidden)).view(hidden.shape[0], hidden.shape[1] - 1)

    def divergence(self, dense: Tensor, normaliser: Tensor, plans: Sequence[Tensor]) -> list[Tensor]:
        """KL(dense || plan) at every position but the last, nats; the dense distribution is computed once a tile.

        Args:
            dense: Final hidden states of the dense model, [b, T, D].
            normaliser: Its normaliser, float32 [b, T-1].
            plans: Final hidden states of the subnetworks, [b, T, D] each.

        Returns:
            float32 [b, T-1] each.
        """
        everything = [self._rows(hidden).split(CHUNK_TOKENS) for hidden in (dense, *plans)]
        norms = normaliser.reshape(-1).split(CHUNK_TOKENS)
        out: list[list[Tensor]] = [[] for _ in plans]
        for norm, reference, *rows in zip(norms, *everything, strict=True):
            sums: list[list[Tensor]] = [[] for _ in plans]
            excess = [torch.zeros_like(norm) for _ in plans]  # sum of p (dense logit - logit)
            for tile in self._tiles():
                logits = tile(reference)
                weights = (logits - norm[:, None]).exp()
                for plan, row in enumerate(rows):
                    theirs = tile(row)
                    sums[plan].append(torch.logsumexp(theirs, -1))
                    excess[plan] += (weights * (logits - theirs)).sum(-1)
            for plan, parts in enumerate(sums):
                out[plan].append(_total(parts) - norm + excess[plan])
        return [torch.cat(parts).view(normaliser.shape) for parts in out]

    def logit_distance(self, dense: Tensor, plan: Tensor) -> Tensor:
        """||W (z_plan - z_dense)||_2 at every position but the last, z the normed final states; float32 [b, T-1].

        By the Gram matrix W'W [D, D], so no logits are computed. Scaling and soft caps of the logits are left out.
        """
        if self._gram is None:
            weight = self._weight().detach().float()
            self._gram = weight.T @ weight
        difference = (self._rows(plan) - self._rows(dense)).float()
        squared = ((difference @ self._gram) * difference).sum(-1).clamp_min(0)
        return squared.sqrt().view(dense.shape[0], dense.shape[1] - 1)

    def _rows(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)[:, :-1].reshape(-1, hidden.shape[-1])

    def _normaliser(self, rows: Tensor) -> Tensor:
        """Of normed states [n, D], float32 [n]; where gradients are wanted, tiles are computed again for them."""

        def part(tile: Callable[[Tensor], Tensor], some: Tensor) -> Tensor:
            return torch.logsumexp(tile(some), -1)

        def total(some: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return _total([part(tile, some) for tile in self._tiles()])
            return _total([checkpoint(part, tile, some, use_reentrant=False) for tile in self._tiles()])

        return torch.cat([total(some) for some in rows.split(CHUNK_TOKENS)])

    def _chosen(self, rows: Tensor, words: Tensor) -> Tensor:
        """The logit of one word for every row, float32 [n]."""
        logits = torch.linalg.vecdot(rows.float(), self._weight()[words].float())
        bias = self._bias()
        return self._shaped(logits if bias is None else logits + bias[words].float())

    def _tiles(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Parts of the projection: normed states [n, D] -> logits float32 [n, at most CHUNK_WORDS]."""
        weight, bias = self._weight(), self._bias()
        for first in range(0, len(weight), CHUNK_WORDS):
            some = slice(first, first + CHUNK_WORDS)

            def tile(rows: Tensor, some: slice = some) -> Tensor:
                return self._shaped(functional.linear(rows, weight[some], None if bias is None else bias[some]).float())

            yield tile

    def _shaped(self, logits: Tensor) -> Tensor:
        """Scaled and capped as the family does."""
        if self.scaling != 1.0:
            logits = logits / self.scaling
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _weight(self) -> Tensor:
        return self.projection.get_parameter("weight")

    def _bias(self) -> Tensor | None:
        return getattr(self.projection, "bias", None)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """logsumexp of the tiles' logsumexps, [n] each."""
    return torch.logsumexp(torch.stack(parts), 0)
