"""The text a model writes for its own calibration, and windows that repeat themselves."""

import pytest
import torch

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import load_dense
from pruning.plan import Sublayer
from pruning.texts.calibration import repeated, self_generated, standard_library
from pruning.texts.openings import OPENINGS
from tests.conftest import pico_tokenizer

LENGTH = 64


def written(model, seed: int = 3, count: int = 70) -> torch.Tensor:
    """More rows than there are openings and than one batch holds."""
    return self_generated(model, pico_tokenizer(), count, LENGTH, seed, Reporter())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_rows_go_on_from_openings_of_many_registers(pico, model_type):
    tokenizer, model = pico_tokenizer(), pico(model_type)
    before = torch.random.get_rng_state()
    rows = written(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert rows.shape == (70, LENGTH)
    assert rows.dtype == torch.int64
    for number, row in enumerate(rows):
        opening = tokenizer(OPENINGS[number % len(OPENINGS)])["input_ids"]
        assert row[: len(opening)].tolist() == opening
    # Rows that go on from the same opening are other samples.
    assert not torch.equal(rows[0], rows[len(OPENINGS)])


def test_the_seed_decides(pico):
    model = pico("llama")
    rows = written(model, count=5)
    assert torch.equal(rows, written(model, count=5))
    assert not torch.equal(rows, written(model, seed=4, count=5))


def test_rows_are_samples_of_the_model_that_sees_no_padding(pico):
    """Their mean surprise is the entropy: 0.02 off here, and 0.2 where the padding of short openings is attended to."""
    tokenizer, model = pico_tokenizer(), pico("llama")
    rows = written(model, count=len(OPENINGS))
    with torch.inference_mode():
        log = torch.log_softmax(model(rows).logits[:, :-1].float(), -1)
    surprise = -log.gather(2, rows[:, 1:, None])[..., 0]
    excess = surprise + (log.exp() * log).sum(-1)
    openings = [len(tokenizer(opening)["input_ids"]) for opening in OPENINGS]
    sampled = torch.cat([row[first:] for row, first in zip(excess, openings, strict=True)])
    assert float(sampled.mean().abs()) < 0.06


def test_repeated_windows_count_what_is_copied():
    rows, copies = repeated(torch.arange(14).view(2, 7))
    assert rows.tolist() == [[0, 1, 2, 0, 1, 2], [7, 8, 9, 7, 8, 9]]
    assert copies.tolist() == [[False, False, False, True, True]] * 2


@pytest.mark.embedded
def test_a_model_copies_from_the_first_half_of_repeated_windows_until_it_loses_what_copies():
    """SmolLM2: 0.49 nats a token; without the attention of 14 and 17, which cost text 0.1, 0.69."""
    dense = load_dense("smollm2-135m", "float32", "cpu", Reporter())
    rows, copies = repeated(standard_library(dense.tokenizer, 512, 128, 0))
    plans = [{}, {Sublayer(14, "attention"): None, Sublayer(17, "attention"): None}]
    text = Evaluator(dense.model, dense.family, rows[:, :64]).values(plans).mean(1)
    copied = Evaluator(dense.model, dense.family, rows, counted=copies).values(plans).mean(1)
    assert copied[0] < 0.2 * text[0]
    assert copied[1] - copied[0] > 1.5 * (text[1] - text[0])
