"""Next-token losses on text, of one model or of two side by side."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.errors import EvaluationError

CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TextLosses:
    """Next-token cross-entropy of every predicted token of every window, float32 [n, T-1], nats."""

    values: Tensor

    @property
    def mean(self) -> float:
        """Over all predicted tokens, nats/token."""
        return float(self.values.double().mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.mean)

    @property
    def windows(self) -> Tensor:
        """Mean of every window, float64 [n]."""
        return self.values.double().mean(1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same windows, [n, T-1] each.

    Attributes:
        reference: Losses of the reference (dense) model.
        other: Losses of the other.
        divergence: KL(reference || other), float32, nats.
        agrees: Whether both give the same token the highest probability, bool.
    """

    reference: TextLosses
    other: TextLosses
    divergence: Tensor
    agrees: Tensor


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None) -> Tensor:
    """Cut a text into windows of `length` tokens that do not overlap; what is left at the end is not used.

    Args:
        text: Plain text; no special tokens are added.
        tokenizer: Of the model.
        length: T, at least 2.
        limit: Use only so many tokens from the start.

    Returns:
        int64 [n, length].

    Raises:
        EvaluationError: The text is shorter than one window.
    """
    if limit is not None:
        text = text[: limit * 16]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:limit]
    count = len(ids) // length
    if count < 1:
        raise EvaluationError(f"the text holds {len(ids)} tokens, less than one window of {length}")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def final_states(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Normed final states [b, T-1, D] of all tokens of int64 [b, T] but the last, on the model's device."""
    return model.get_decoder()(input_ids=batch.to(model.device), use_cache=False).last_hidden_state[:, :-1]


def logits_of(model: PreTrainedModel, normed: Tensor) -> Tensor:
    """Logits float32 [n, V] of normed final states [n, D], scaled and capped as the family does."""
    logits = model.get_output_embeddings()(normed).float()
    if scaling := getattr(model.config, "logits_scaling", None):
        logits = logits / scaling
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def batches_of(windows: Tensor, tokens: int = 1024) -> list[Tensor]:
    """Split [n, T] so that one forward sees about so many tokens."""
    return list(windows.split(max(1, tokens // windows.shape[1])))


@torch.inference_mode()
def token_losses(model: PreTrainedModel, windows: Tensor, advance: Callable[[], None] | None = None) -> TextLosses:
    """Cross-entropy of every token but the first of every window, given those before it in the window.

    Args:
        model: Dense or pruned.
        windows: int64 [n, T].
        advance: Called once a batch of `batches_of(windows)`.
    """
    rows = []
    for batch in batches_of(windows):
        states, targets = final_states(model, batch).flatten(0, 1), batch[:, 1:].flatten().to(model.device)
        parts = [
            functional.cross_entropy(logits_of(model, state), target, reduction="none")
            for state, target in zip(states.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        ]
        rows.append(torch.cat(parts).view(len(batch), -1).cpu())
        if advance:
            advance()
    return TextLosses(torch.cat(rows))


@torch.inference_mode()
def compare(
    reference: PreTrainedModel, other: PreTrainedModel, windows: Tensor, advance: Callable[[], None] | None = None
) -> Comparison:
    """Losses of two models of one vocabulary, KL(reference || other) and top-1 agreement, in one pass over the text.

    Args:
        reference: Usually the dense model.
        other: Usually the pruned model.
        windows: int64 [n, T].
        advance: Called once a batch of `batches_of(windows)`.
    """
    columns: list[list[Tensor]] = [[], [], [], []]
    for batch in batches_of(windows):
        targets = batch[:, 1:].flatten().to(reference.device)
        pairs = (final_states(reference, batch).flatten(0, 1), final_states(other, batch).flatten(0, 1))
        for first, second, target in zip(*(x.split(CHUNK_TOKENS) for x in (*pairs, targets)), strict=True):
            p = logits_of(reference, first).log_softmax(-1)
            q = logits_of(other, second).log_softmax(-1)
            columns[0].append(-p.gather(1, target[:, None])[:, 0].cpu())
            columns[1].append(-q.gather(1, target[:, None])[:, 0].cpu())
            columns[2].append((p.exp() * (p - q)).sum(-1).clamp_min(0).cpu())
            columns[3].append((p.argmax(-1) == q.argmax(-1)).cpu())
        if advance:
            advance()
    shape = (len(windows), windows.shape[1] - 1)
    dense, pruned, divergence, agrees = (torch.cat(column).view(shape) for column in columns)
    return Comparison(TextLosses(dense), TextLosses(pruned), divergence, agrees)


def loss_by_position(losses: TextLosses) -> dict[str, float]:
    """Mean loss of tokens with 1, 2-3, 4-7, 8-15, ... tokens before them, nats/token."""
    out, first, width = {}, 1, losses.values.shape[1]
    while first <= width:
        last = min(2 * first - 1, width)
        out[f"{first}-{last}"] = float(losses.values[:, first - 1 : last].double().mean())
        first *= 2
    return out
