"""Measure a model on token windows."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.families import Family
from pruning.subnetwork import Evaluator


def loss(model: PreTrainedModel, family: Family, tokens: Tensor) -> float:
    """Mean next-token cross-entropy over int64 [n, T], nats/token."""
    return float(Evaluator(model, family, tokens).loss({}).mean())


def perplexity_ratio(dense_loss: float, pruned_loss: float) -> float:
    """exp(pruned - dense), both in nats/token."""
    return float(torch.tensor(pruned_loss - dense_loss, dtype=torch.float64).exp())
