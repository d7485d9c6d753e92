"""Losses on text equal plain transformers; two models side by side; intervals cover what they should."""

import math

import numpy as np
import pytest
import torch

from pruning.errors import EvaluationError
from pruning.evaluation.paired import bootstrap
from pruning.evaluation.text import compare, loss_by_position, text_windows, token_losses
from tests.conftest import pico_tokenizer, tokens


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
def test_perplexity_equals_plain_transformers(family, pico):
    fields = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 5.0}}.get(family, {})
    model, windows = pico(family, **fields), tokens()
    with torch.inference_mode():
        plain = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
    losses = token_losses(model, windows)
    assert losses.perplexity == pytest.approx(math.exp(sum(plain) / len(plain)), rel=1e-5)
    assert losses.windows.tolist() == pytest.approx(plain, abs=1e-5)


def test_side_by_side_equals_alone(pico):
    dense, other, windows = pico("llama"), pico("llama", seed=1), tokens()
    both = compare(dense, other, windows)
    assert torch.allclose(both.reference.values, token_losses(dense, windows).values, atol=1e-5)
    assert torch.allclose(both.other.values, token_losses(other, windows).values, atol=1e-5)
    with torch.inference_mode():
        p, q = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (dense, other))
    assert torch.allclose(both.divergence.double(), (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert torch.equal(both.agrees, p.argmax(-1) == q.argmax(-1))
    same = compare(dense, dense, windows)
    assert float(same.divergence.max()) < 1e-5
    assert bool(same.agrees.all())


def test_positions_are_cut_at_powers_of_two(pico):
    losses = token_losses(pico("llama"), tokens(length=12))
    by_position = loss_by_position(losses)
    assert list(by_position) == ["1-1", "2-3", "4-7", "8-11"]
    assert by_position["2-3"] == pytest.approx(float(losses.values[:, 1:3].mean()), abs=1e-6)


def test_windows_follow_the_text():
    windows = text_windows("abcdefghij", pico_tokenizer(), 4)
    assert pico_tokenizer().decode(windows.flatten()) == "abcdefgh"
    with pytest.raises(EvaluationError, match="holds 10 tokens, less than one window of 16"):
        text_windows("abcdefghij", pico_tokenizer(), 16)


def test_paired_interval_covers_the_true_difference():
    """Of 200 intervals of a known difference about 190 cover it; common difficulty does not widen them."""
    generator = np.random.default_rng(3)
    covered, widths = 0, []
    for seed in range(200):
        difficulty, noise = generator.normal(0, 5, 80), generator.normal(0.3, 1, 80)
        interval = bootstrap((difficulty + noise) - difficulty, seed=seed, resamples=500)
        covered += interval.low <= 0.3 <= interval.high
        widths.append(interval.high - interval.low)
    assert 178 <= covered <= 200
    assert np.mean(widths) < 0.5
