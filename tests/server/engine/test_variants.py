"""Kinds of variants are found by name, other people's too."""

import pytest
from torch import nn

from pruning.errors import CheckpointError
from server.engine import variants
from server.engine.loader import check_stage
from server.engine.stand_ins import build_emulation
from server.engine.variants.bias import Bias
from server.engine.variants.interface import StandInVariant
from tests.server.engine.test_stand_ins import KEPT, block

DOUBLE = StandInVariant(lambda spec, hidden_size, fused: Bias(hidden_size, fused), reads="mind")


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(variants, "STAND_INS", dict(variants.STAND_INS))
    variants.add("double", f"{__name__}:DOUBLE")


def test_every_row_of_the_tables_is_there():
    for kind in variants.STAND_INS:
        assert isinstance(variants.stand_in({"kind": kind}), StandInVariant)
    entry = {"no_op": False, "emulation": None, **{key: {"size": 4, "sink": False} for key in variants.CHANGES}}
    assert len(list(variants.changes_of(entry))) == len(variants.CHANGES)
    assert variants.unchanged(entry) == KEPT
    ffn = {**KEPT, **{key: {"threshold": 0.0, "rank": 2, "first": 4} for key in variants.FFN_CHANGES}}
    assert len(list(variants.ffn_changes_of(ffn))) == len(variants.FFN_CHANGES)
    assert not list(variants.ffn_changes_of(KEPT))


def test_a_removed_layer_and_one_without_a_window_are_not_changed():
    assert not list(variants.changes_of(KEPT))
    assert not list(variants.changes_of({**KEPT, "window": None}))
    assert not list(variants.changes_of({"no_op": True, "emulation": None, "window": {"size": 4, "sink": False}}))


def test_somebody_elses_kind_is_built_and_named(added, monkeypatch):
    monkeypatch.setitem(variants.STAND_INS, "double", "server.engine.variants.bias:VARIANT")
    assert isinstance(build_emulation({"kind": "double"}, 8, fused=True), nn.Module)
    with pytest.raises(ValueError, match="'double' is registered already"):
        variants.add("double", "somewhere:VARIANT")


def test_a_message_says_what_a_kind_reads_in_its_own_words(monkeypatch):
    monkeypatch.setattr(variants, "_load", lambda target: DOUBLE)
    reader = block({"no_op": True, "emulation": {"kind": "kv_share", "sources": [0]}})
    with pytest.raises(CheckpointError, match="reads the mind of block 0"):
        check_stage([block(KEPT), block(KEPT), reader], 1, 3, may_lack_attention=True)
