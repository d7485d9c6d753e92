"""What a subnetwork is judged by, from its final hidden states; logits exist only a chunk at a time."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pruning.families import Family

Objective = Literal["loss", "kl", "logits"]
CHUNK_TOKENS = 512


class Head:
    """Final norm and output projection of a model.

    Args:
        model: Dense model.
        family: Where its parts are.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.norm: nn.Module = model.get_submodule(family.norm)
        self.projection: nn.Module = model.get_submodule(family.head)
        self.scaling = float(getattr(model.config, "logits_scaling", None) or 1.0)
        self.cap = getattr(model.config, "final_logit_softcapping", None)
        self._gram: Tensor | None = None

    def logits(self, normed: Tensor) -> Tensor:
        """Logits float32 [n, V] of normed states [n, D], scaled and capped as the family does."""
        logits = self.projection(normed).float()
        if self.scaling != 1.0:
            logits = logits / self.scaling
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Next-token cross-entropy of final hidden states.

        Args:
            hidden: What leaves the last block, [b, T, D].
            targets: int64 [b, T-1], the next tokens.

        Returns:
            float32 [b, T-1], nats.
        """
        flat, wanted = self._rows(hidden), targets.reshape(-1).to(hidden.device)
        parts = [
            functional.cross_entropy(self.logits(part), target, reduction="none")
            for part, target in zip(flat.split(CHUNK_TOKENS), wanted.split(CHUNK_TOKENS), strict=True)
        ]
        return torch.cat(parts).view(targets.shape)

    def divergence(self, dense: Tensor, plans: Sequence[Tensor]) -> list[Tensor]:
        """KL(dense || plan) at every position but the last, nats; the dense distribution is computed once a chunk.

        Args:
            dense: Final hidden states of the dense model, [b, T, D].
            plans: Those of the subnetworks, [b, T, D] each.

        Returns:
            float32 [b, T-1] each.
        """
        rows = [self._rows(hidden).split(CHUNK_TOKENS) for hidden in plans]
        parts: list[list[Tensor]] = [[] for _ in plans]
        for number, chunk in enumerate(self._rows(dense).split(CHUNK_TOKENS)):
            reference = functional.log_softmax(self.logits(chunk), -1)
            weights = reference.exp()
            entropy = -(weights * reference).sum(-1)
            for part, row in zip(parts, rows, strict=True):
                logits = self.logits(row[number])
                # Cross-entropy minus entropy: one pass over the vocabulary less than the textbook form.
                part.append(torch.logsumexp(logits, -1) - (weights * logits).sum(-1) - entropy)
        shape = (dense.shape[0], dense.shape[1] - 1)
        return [torch.cat(part).view(shape) for part in parts]

    def logit_distance(self, dense: Tensor, plan: Tensor) -> Tensor:
        """||W (z_plan - z_dense)||_2 at every position but the last, z the normed final states; float32 [b, T-1].

        By the Gram matrix W'W [D, D], so no logits are computed. Scaling and soft caps of the logits are left out.
        """
        if self._gram is None:
            weight = self.projection.get_parameter("weight").detach().float()
            self._gram = weight.T @ weight
        difference = (self._rows(plan) - self._rows(dense)).float()
        squared = ((difference @ self._gram) * difference).sum(-1).clamp_min(0)
        return squared.sqrt().view(dense.shape[0], dense.shape[1] - 1)

    def _rows(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)[:, :-1].reshape(-1, hidden.shape[-1])
