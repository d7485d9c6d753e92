"""Prompts have the length asked for, hide their lines where asked, and mark the answers."""

import itertools
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pruning.errors import CalibrationError
from pruning.texts.long_context import (
    GIVEN,
    HOPS,
    KEYS,
    KINDS,
    LISTED,
    PLACED,
    VALUES,
    code_prompts,
    filler,
    long_prompts,
)
from pruning.texts.words import NAMES, THINGS
from tests.conftest import pico_tokenizer

TOKENIZER = pico_tokenizer()
TEXT = "The herring swam on, and nothing was said of it. " * 200
OTHER = filler(TOKENIZER, TEXT, 4096)
KIND = st.sampled_from(sorted(KINDS))
LENGTH = st.integers(1000, 3000)
DEPTH = st.floats(0, 1)
SEED = st.integers(0, 10**6)


def one(kind="needle", length=1024, depth=0.5, seed=0):
    return long_prompts(kind, TOKENIZER, OTHER, length, depth, 1, seed)[0]


def answers(prompt):
    return [TOKENIZER.decode(prompt.tokens[start : start + length]) for start, length in prompt.spans]


@given(KIND, LENGTH, DEPTH, SEED)
@settings(deadline=None, max_examples=60)
def test_length_is_exact_and_the_seed_decides(kind, length, depth, seed):
    prompt = one(kind, length, depth, seed)
    assert prompt.tokens.shape == (length,)
    assert prompt.tokens.dtype == torch.int64
    assert prompt.length == length
    assert prompt.depth == (depth if kind in PLACED else None)
    assert prompt.tokens[0] == TOKENIZER.bos_token_id
    again = one(kind, length, depth, seed)
    assert torch.equal(again.tokens, prompt.tokens)
    assert again.spans == prompt.spans
    assert not torch.equal(one(kind, length, depth, seed + 1).tokens, prompt.tokens)


@given(KIND, LENGTH, DEPTH, SEED)
@settings(deadline=None, max_examples=60)
def test_every_answer_stands_earlier_in_the_text(kind, length, depth, seed):
    prompt = one(kind, length, depth, seed)
    before = TOKENIZER.decode(prompt.tokens[1 : prompt.spans[0][0]])
    for answer in answers(prompt):
        assert answer in before or kind == "copy"
        assert answer.startswith(" ") != (kind == "values")
    ends = [start + count for start, count in prompt.spans]
    assert ends[-1] == length
    assert all(end <= start for end, (start, _) in zip(ends, prompt.spans[1:], strict=False))
    assert int(prompt.counted.sum()) == sum(count - prompt.guessed for _, count in prompt.spans)
    assert prompt.counted.shape == (length - 1,)
    assert prompt.answers.tolist() == [i for start, count in prompt.spans for i in range(start, start + count)]


@given(DEPTH, DEPTH, SEED, st.sampled_from(PLACED))
@settings(deadline=None, max_examples=40)
def test_deeper_lines_stand_later(a, b, seed, kind):
    low, high = sorted((a, b))
    mark = {"needle": "The code of", "copy": "The words of the list"}[kind]
    texts = (TOKENIZER.decode(one(kind, 1500, depth, seed).tokens[1:]) for depth in (0, low, high, 1))
    start, first, second, end = (text.index(f"\n{mark}") for text in texts)
    assert start == 0
    assert (first, second) == (round(low * end), round(high * end))


def test_depths_differ_in_nothing_else():
    assert answers(one(depth=0)) == answers(one(depth=1))
    assert sorted(one(depth=0).tokens.tolist()) == sorted(one(depth=1).tokens.tolist())
    assert TOKENIZER.decode(one(depth=0).tokens[1:]).startswith("\nThe code of")


def test_keys_are_spread_and_asked_in_another_order():
    prompt = one("keys", 2048, seed=3)
    text = TOKENIZER.decode(prompt.tokens[1:])
    facts = re.findall(r"\nThe code of (\w+) is (\d{5})", text)
    assert len(facts) == 2 * KEYS
    hidden, asked = facts[:KEYS], facts[KEYS:]
    assert sorted(hidden) == sorted(asked)
    assert hidden != asked
    assert answers(prompt) == [f" {code}" for _, code in asked]
    places = [text.index(f"{name} is {code}") for name, code in hidden]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert max(gaps) - min(gaps) <= 10


@given(SEED)
@settings(deadline=None, max_examples=30)
def test_the_first_digit_of_every_value_is_given_and_tells_it_from_the_others(seed):
    prompt = one("values", seed=seed)
    text = TOKENIZER.decode(prompt.tokens[1:])
    codes = re.findall(r"A code of \w+ is (\d{5})", text)
    asked = re.search(r"The 4 codes of \w+ are ([\d, ]+)$", text)[1].split(", ")
    assert sorted(asked) == sorted(codes)
    assert answers(prompt) == [code[1:] for code in asked]
    assert len({code[0] for code in codes}) == len(codes) == VALUES


@given(SEED)
@settings(deadline=None, max_examples=30)
def test_the_variable_is_followed_to_its_value(seed):
    prompt = one("variable", seed=seed)
    text = TOKENIZER.decode(prompt.tokens[1:])
    lines = re.findall(r"\nVAR (\w+) = (\w+)", text)
    hidden, followed = lines[: 2 * (HOPS + 1)], lines[2 * (HOPS + 1) :]
    held, last = {}, {}
    for name, source in hidden:
        held[name] = held.get(source, source)
        last[held[name]] = name
    assert len(held) == 2 * (HOPS + 1)
    assert len(last) == 2
    assert set(followed) <= set(hidden)
    assert [target for target, _ in followed[1:]] == [source for _, source in followed[:-1]]
    assert held[followed[0][0]] == followed[-1][1]
    assert last[followed[-1][1]] == followed[0][0]
    assert answers(prompt) == [f" {source}" for _, source in followed]


def test_the_list_comes_again():
    prompt = one("copy", depth=0.2)
    lists = re.findall(r"The words of the list are([\w ]+)", TOKENIZER.decode(prompt.tokens[1:]))
    assert len(lists) == 2
    assert lists[0] == lists[1]
    assert [word.strip() for word in answers(prompt)] == lists[0].split()[GIVEN:]
    assert len(prompt.spans) == LISTED - GIVEN


def test_code_prompts_do_not_count_the_first_token_of_a_code():
    first, second = code_prompts(TOKENIZER, TEXT, 1200, 2, seed=5)
    assert torch.equal(first.tokens, code_prompts(TOKENIZER, TEXT, 1200, 1, seed=5)[0].tokens)
    assert not torch.equal(first.tokens, second.tokens)
    assert first.guessed == 1
    for start, length in first.spans:
        assert first.counted[start - 1 : start - 1 + length].tolist() == [False] + [True] * (length - 1)
        assert TOKENIZER.decode(first.tokens[start + 1 : start + length]).isdigit()
    assert len(code_prompts(TOKENIZER, None, 256, 1, seed=5, keys=2)[0].spans) == 2


def merging_tokenizer(pre):
    """A tokenizer whose tokens hold several letters or digits, with the space before them."""
    chance = random.Random(0)
    corpus = [f"\nThe code of {name} is {chance.randrange(10**5)}.\n" for name in (*NAMES, *THINGS) for _ in range(20)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    decoder = decoders.Metaspace() if isinstance(pre, pre_tokenizers.Metaspace) else decoders.ByteLevel()
    tokenizer.decoder = decoder
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "\n", *map(chr, range(32, 127))]
    tokenizer.train_from_iterator([*corpus, TEXT], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "pre", [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Metaspace()], ids=["bytes", "metaspace"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_marked_whatever_the_tokens(kind, pre):
    tokenizer = merging_tokenizer(pre)
    assert len(tokenizer(" 12345", add_special_tokens=False)["input_ids"]) < 5
    other = filler(tokenizer, TEXT, 1024)
    for prompt in long_prompts(kind, tokenizer, other, 700, 0.5, 8, seed=2):
        assert len(prompt.tokens) == 700
        text = tokenizer.decode(prompt.tokens)
        for start, length in prompt.spans:
            answer = tokenizer.decode(prompt.tokens[start : start + length]).strip()
            assert answer
            assert answer.isdigit() if kind in ("needle", "keys", "values") else answer.isalnum()
            assert text.count(answer) >= 2


def test_a_tokenizer_without_a_first_token():
    bare = pico_tokenizer()
    bare.bos_token = None
    prompt = long_prompts("needle", bare, OTHER, 300, 0.5, 1, 0)[0]
    assert len(prompt.tokens) == 300
    assert TOKENIZER.bos_token_id not in prompt.tokens


def test_what_does_not_fit_is_refused():
    with pytest.raises(CalibrationError, match=r"256 tokens hold no prompt of kind keys, which needs \d+"):
        long_prompts("keys", TOKENIZER, OTHER, 256, 0.5, 1, 0)
    with pytest.raises(CalibrationError, match="the text around the prompts holds 5 tokens, fewer than"):
        long_prompts("needle", TOKENIZER, filler(TOKENIZER, "short", 256), 256, 0.5, 1, 0)
    with pytest.raises(CalibrationError, match="holds 0 tokens"):
        code_prompts(TOKENIZER, "", 1024, 1, 0)
