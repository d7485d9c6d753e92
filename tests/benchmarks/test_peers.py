"""Attention of other methods does what it says, what models write is judged right, and code runs behind bars."""

import random
import sys
from pathlib import Path

import pytest
import torch

from pruning.evaluation.text import token_losses
from pruning.families import FAMILIES
from pruning.recovery.distillation import sharing_copy
from tests.conftest import tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peer_attention as peers
import tasks
from sandbox import passes

FAMILY = FAMILIES["llama"]


@pytest.fixture(scope="module")
def dense(pico):
    return pico("llama")


def test_a_window_as_long_as_the_text_changes_nothing(dense):
    model, rows = sharing_copy(dense), tokens(2, 48)
    peers.first_and_recent(model, FAMILY, dict.fromkeys(range(6), 64))
    torch.testing.assert_close(token_losses(model, rows).values, token_losses(dense, rows).values)


def test_first_and_recent_tokens_are_what_is_seen(monkeypatch):
    monkeypatch.setattr(peers, "STEP", 16)

    class Module:
        shoal_recent = 10

    q, k, v = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    own, seen = torch.arange(50)[:, None], torch.arange(50)
    allowed = (seen <= own) & ((own - seen < 10) | (seen < peers.FIRST))
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    wanted = (logits.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    found, _ = peers._first_and_recent(Module, q, k, v, None, 1.0)
    torch.testing.assert_close(found, wanted)


def test_lazy_ratios_are_shares_and_leave_the_model_as_it_was(dense):
    rows = tokens(1, 40)
    before = token_losses(dense, rows).values
    ratios = peers.lazy_ratios(dense, FAMILY, rows, 12)
    assert len(ratios) == 6
    assert all(0 < ratio < 1 for ratio in ratios)
    assert peers.lazy_ratios(dense, FAMILY, rows, 44) == pytest.approx([1.0] * 6)
    assert torch.equal(token_losses(dense, rows).values, before)
    assert peers.laziest([0.1, 0.9, 0.5, 0.9], 3) == [1, 2, 3]


@pytest.mark.parametrize(("kind", "steps"), [("fp8", 2**-4), ("int8", 1 / 254)])
def test_small_numbers_are_near_and_change_what_is_computed(dense, kind, steps):
    numbers = torch.randn(3, 5, 16)
    gap = (peers.KINDS[kind](numbers) - numbers).abs()
    bound = numbers.abs() if kind == "fp8" else numbers.abs().amax(-1, keepdim=True)
    assert (gap <= steps * bound + 1e-4).all()
    assert gap.max() > 0
    model, rows = sharing_copy(dense), tokens(1, 40)
    peers.quantised(model, FAMILY, kind)
    change = (token_losses(model, rows).values - token_losses(dense, rows).values).abs().max()
    assert 0 < change < 0.2


@pytest.mark.parametrize(
    ("code", "good"),
    [
        ("def double(x):\n    return 2 * x", True),
        ("def double(x):\n    print('x' * 9999)\n    return 2 * x", True),
        ("def double(x):\n    return x", False),
        ("def other(x):\n    return 2 * x", False),
        ("def double(x", False),
        ("import os\nos._exit(0)", False),
        ("import socket\ndef double(x):\n    socket.socket()\n    return 2 * x", False),
        ("import subprocess\ndef double(x):\n    subprocess.run(['true'])\n    return 2 * x", False),
        ("import os\ndef double(x):\n    os.fork()\n    return 2 * x", False),
        ("def double(x):\n    open('file', 'w').write('x')\n    return 2 * x", False),
        ("def double(x):\n    return len([0] * 10**9) and 2 * x", False),
    ],
)
def test_the_sandbox_judges_and_holds(code, good):
    assert passes(code, "double", [([3], 6), ([0], 0)]) is good


def test_code_without_an_end_is_ended(monkeypatch):
    monkeypatch.setattr("sandbox.WALL_SECONDS", 2)
    assert not passes("def double(x):\n    while True:\n        pass", "double", [([3], 6)])


def words(text):
    return len(text.split())


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_items_are_the_same_again_and_as_long_as_asked(kind):
    def made(between):
        items = tasks.KINDS[kind](words, between, 0)
        return [next(items) for _ in range(3)]

    def size(prompt):
        return words(prompt) if isinstance(prompt, str) else sum(words(turn["content"]) for turn in prompt)

    assert [item.prompt for item in made(900)] == [item.prompt for item in made(900)]
    assert all(size(item.prompt) >= 900 for item in made(900))
    assert len({item.name for item in made(0)}) == 3


def test_sums_have_whole_answers_and_are_judged_by_the_last_number():
    for seed in range(200):
        assert tasks._sum(random.Random(seed))[2] > 0
    item = next(tasks.sums(words, 0, 0))
    answer = next(number for number in range(20000) if item.judge(str(number)))
    assert item.judge(f"First 3 times 4 is 12.\nSo it is {answer:,}.") == 1
    assert item.judge(f"{answer}, no, {answer + 1}") == 0
    assert item.judge("I do not know") == 0


def test_a_line_is_judged_without_its_spaces():
    item = next(tasks.completions(words, 0, 0))
    assert item.judge("") == 0
    assert tasks.alike("\n    return x\n    y", "return x") == 1
    assert tasks.written_code("Here:\n```python\nx = 1\n```\nDone") == "x = 1\n"
    assert tasks.written_code("x = 1") == "x = 1"
