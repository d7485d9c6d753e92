"""FFNs that tokens skip, in the engine: the twin computes what transformers computes, and fixed shapes are refused."""

import json

import pytest
import torch
from torch import nn

from pruning.errors import CheckpointError
from pruning.variants.skip import Skip as Offline
from server.cli import _check_eager
from server.engine import variants
from server.engine.loader import check_eager
from tests.server.engine.test_stand_ins import KEPT

SIZE, RANK, TOKENS = 16, 3, 40
ENTRY = {**KEPT, "skip": {"threshold": 0.1, "rank": RANK, "first": 4}}


class FFN(nn.Module):
    """Some FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 32), nn.Linear(32, SIZE)
        self.read: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.read.append(len(hidden))
        return self.down(self.up(hidden).relu())


class Attention(nn.Module):
    """Is told the positions, as vLLM's attention modules are."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def served(share: float = 1.0) -> tuple[FFN, Attention]:
    """An FFN that is skipped as `ENTRY` says, with random tensors."""
    torch.manual_seed(0)
    ffn, attention = FFN(), Attention()
    for variant, spec in variants.ffn_changes_of(ENTRY):
        variant.prepare(ffn, attention, spec, SIZE, share)
    for name, parameter in ffn.named_parameters():
        if name.startswith("skip_"):
            parameter.data = torch.randn(parameter.shape)
    return ffn.requires_grad_(False), attention


def offline(ffn: FFN, threshold: float) -> nn.Module:
    """transformers' side with the same tensors."""
    made = Offline(SIZE, threshold, RANK)
    made.load_state_dict({name: each for name, each in ffn.state_dict().items() if name.startswith("skip_")})
    stock = FFN()
    stock.load_state_dict({name: each for name, each in ffn.state_dict().items() if not name.startswith("skip_")})
    return made.inside(stock).requires_grad_(False)


@pytest.mark.parametrize("threshold", [-1e9, 0.1, 1e9])
def test_the_twin_computes_the_same_and_runs_for_no_token_that_skips(threshold):
    ffn, attention = served()
    vars(ffn)["forward"].threshold = threshold
    hidden = torch.randn(TOKENS, SIZE)
    attention(positions=torch.arange(TOKENS), hidden_states=hidden)
    theirs = offline(ffn, threshold)
    torch.testing.assert_close(ffn(hidden), theirs(hidden[None])[0])
    assert sum(ffn.read) == theirs.emulation.seen - theirs.emulation.skipped
    assert sum(ffn.read) >= 4


def test_positions_are_those_of_each_token_in_a_mixed_step():
    ffn, attention = served()
    vars(ffn)["forward"].threshold = 1e9
    attention(positions=torch.tensor([70, 0, 1, 9, 3, 4]), hidden_states=torch.zeros(6, SIZE))
    ffn(torch.randn(6, SIZE))
    assert ffn.read == [3]
    ffn.read.clear()
    attention(positions=torch.tensor([70, 71]), hidden_states=torch.zeros(2, SIZE))
    assert ffn(torch.randn(2, SIZE)).shape == (2, SIZE)
    assert ffn.read == []


def test_a_score_that_is_no_number_skips_nothing():
    ffn, attention = served()
    attention(positions=torch.arange(50, 52), hidden_states=torch.zeros(2, SIZE))
    ffn(torch.full((2, SIZE), float("nan")))
    assert ffn.read == [2]


def test_a_rank_adds_its_share_where_the_block_sums_over_ranks():
    (whole, attention), (half, other) = served(), served(0.5)
    hidden = torch.randn(2, SIZE)
    for ffn, told in ((whole, attention), (half, other)):
        vars(ffn)["forward"].threshold = 1e9
        told(positions=torch.arange(50, 52), hidden_states=hidden)
    torch.testing.assert_close(2 * half(hidden), whole(hidden))


def test_what_would_be_captured_or_compiled_is_refused_in_one_line(tmp_path):
    blocks = [{"attention": KEPT, "ffn": KEPT}, {"attention": KEPT, "ffn": ENTRY}]
    check_eager(blocks, eager=True)
    check_eager(blocks[:1], eager=False)
    with pytest.raises(CheckpointError, match=r"FFNs of 1 blocks are skipped.*--enforce-eager"):
        check_eager(blocks, eager=False)
    (tmp_path / "config.json").write_text(json.dumps({"block_configs": blocks}))
    _check_eager(str(tmp_path), eager=True)
    with pytest.raises(CheckpointError, match="--enforce-eager"):
        _check_eager(str(tmp_path), eager=False)
