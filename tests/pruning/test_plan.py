"""Counts, shares and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.budget import counts
from pruning.errors import RecipeError
from pruning.plan import KINDS, Plan, Sublayer, kv_bytes_of_request, nearest_kept_attention, parse_amount
from pruning.recipe import Recipe


@pytest.mark.parametrize(("amount", "expected"), [("10", 10), (10, 10), ("33%", 10), ("50%", 15), ("1.7%", 1)])
def test_amounts(amount, expected):
    assert parse_amount(amount, 30, "attention") == expected


@pytest.mark.parametrize("amount", ["0", 0, "31", "101%", "1%", "-3", "x", "3.5", "%", "", "33 %%"])
def test_amounts_that_make_no_sense(amount):
    with pytest.raises(RecipeError, match="--attention"):
        parse_amount(amount, 30, "attention")


@given(st.integers(1, 200), st.floats(0, 100))
def test_a_share_is_rounded_to_the_nearest_count(total, share):
    exact = total * float(f"{share:.3f}") / 100
    if exact < 0.5:
        return
    assert abs(parse_amount(f"{share:.3f}%", total, "ffn") - exact) <= 0.5 + 1e-9


@given(st.integers(1, 128), st.data())
def test_kv_ratio_is_the_ratio_of_kept_attention_layers(blocks, data):
    kept = data.draw(st.integers(1, blocks))
    dense = kv_bytes_of_request(1536, blocks, {}, 100)
    assert kv_bytes_of_request(1536, kept, {}, 100) * blocks == dense * kept
    assert kv_bytes_of_request(1536, kept, {25: blocks - kept}, 100) * 4 * blocks == dense * (3 * kept + blocks)


@given(st.integers(1, 12), st.data())
def test_every_block_is_kept_or_wholly_removed(blocks, data):
    states = st.sampled_from(["kept", "none", "bias", "low_rank"])
    removed = {
        Sublayer(block, kind): state
        for block in range(blocks)
        for kind in KINDS
        if (state := data.draw(states)) != "kept"
    }
    plan = Plan(blocks, removed, rank=4)
    dropped = set(range(blocks)) - set(plan.blocks_kept())
    assert dropped == {b for b in range(blocks) if all(removed.get(Sublayer(b, k)) == "none" for k in KINDS)}
    for kind in KINDS:
        assert set(plan.kept(kind)) == {b for b in range(blocks) if Sublayer(b, kind) not in removed}


def test_a_context_adapter_reads_the_nearest_kept_attention_before_it():
    gone = [Sublayer(2, "attention"), Sublayer(3, "attention"), Sublayer(1, "ffn")]
    assert nearest_kept_attention(gone, 3, 2) == (1, 0)
    assert nearest_kept_attention(gone, 1, 2) == (0,)
    assert nearest_kept_attention(gone, 0, 1) == ()


@pytest.mark.parametrize(
    "recipe",
    [{"attention": 30}, {"attention": 20, "blocks": 10}, {"ffn": 31}, {"attention": 2, "keep": [30]},
     {"attention": 2, "keep": list(range(29))}],
)  # fmt: skip
def test_counts_that_cannot_be_met(recipe):
    with pytest.raises(RecipeError):
        counts(Recipe(emulation="low-rank", **recipe), 30)


@pytest.mark.parametrize("given", ["0,1,5", ["0,1", "5"], ["0", "1", "5"], [0, 1, 5]])
def test_blocks_to_keep_are_given_with_commas_or_spaces(given):
    assert Recipe(keep=given).keep == [0, 1, 5]


def test_a_third_of_attention_goes_by_default():
    assert counts(Recipe(emulation="low-rank"), 30).attention == 10
    assert counts(Recipe(ffn=2), 30).attention == 0
