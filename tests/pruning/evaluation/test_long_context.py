"""Scores of long prompts equal those from whole logits; two models are compared prompt by prompt."""

import pytest
import torch

from pruning.evaluation.long_context import LongScore, score, summary
from pruning.evaluation.paired import wilson
from pruning.texts.long_context import code_prompts, filler, long_prompts
from tests.conftest import pico_tokenizer


def prompts():
    tokenizer = pico_tokenizer()
    other = filler(tokenizer, None, 512)
    made = [
        one
        for kind, length in (("needle", 300), ("copy", 460), ("needle", 200), ("values", 460))
        for one in long_prompts(kind, tokenizer, other, length, 0.5, 2, seed=1)
    ]
    return made + code_prompts(tokenizer, None, 300, 1, seed=1, keys=3)


def easy(model, prompt):
    """The prompt with its first answer as the model writes it."""
    start, length = prompt.spans[0]
    with torch.inference_mode():
        for at in range(start, start + length):
            prompt.tokens[at] = model(input_ids=prompt.tokens[None, :at]).logits[0, -1].argmax()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_equal_whole_logits(family, pico):
    model = pico(family, **({"final_logit_softcapping": 5.0} if family == "gemma2" else {}))
    made = prompts()
    for prompt in made[::2]:
        easy(model, prompt)
    counted = []
    scores = score(model, made, lambda: counted.append(1))
    assert len(counted) == len(made)
    for prompt, found in zip(made, scores, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=prompt.tokens[None]).logits[0, :-1].double()
        nll = -logits.log_softmax(-1).gather(1, prompt.tokens[1:, None])[:, 0]
        assert found.nll == pytest.approx(float(nll[prompt.counted].mean()), abs=1e-5)
        right = logits.argmax(-1) == prompt.tokens[1:]
        assert found.found == tuple(bool(right[s - 1 : s - 1 + n].all()) for s, n in prompt.spans)
    assert all(one.found[0] for one in scores[::2])
    assert not all(one.exact for one in scores)


def test_found_is_what_greedy_decoding_writes(pico):
    model = pico("llama")
    prompt = prompts()[0]
    start, length = prompt.spans[0]
    for _ in range(2):
        ids = prompt.tokens[None, :start]
        with torch.inference_mode():
            for _ in range(length):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert score(model, [prompt])[0].exact == torch.equal(ids[0], prompt.tokens[: start + length])
        easy(model, prompt)


def test_comparison_is_paired():
    mine = [LongScore(1.0, (True, False)), LongScore(2.0, (True, True))]
    theirs = [LongScore(0.5, (True, True)), LongScore(1.5, (False, True))]
    found = summary(mine, theirs, seed=0)
    assert (found["n"], found["answers"]) == (2, 4)
    assert found["found"]["value"] == found["dense_found"]["value"] == 0.75
    assert found["exact"]["value"] == 0.5
    assert found["found_difference"]["value"] == 0
    assert found["nll_difference"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["kept"] == pytest.approx(2 / 3)
    none = [LongScore(1.0, (False, False))] * 2
    assert summary(mine, none, seed=0)["kept"] is None
    assert "dense_found" not in summary(mine, None, seed=0)


def test_interval_of_a_share():
    # Brown, Cai and DasGupta's interval by hand: n = 10, 8 right.
    assert wilson(0.8, 10).low == pytest.approx(0.4902, abs=1e-4)
    assert wilson(0.8, 10).high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(1, 6).low == pytest.approx(0.6097, abs=1e-4)
    assert wilson(1, 6).high == 1
    assert wilson(0, 6).low == 0
