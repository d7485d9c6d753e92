"""What stands in for removed sublayers in vLLM: no engine needed."""

import json

import pytest
import torch
from torch import nn

from pruning.errors import CheckpointError
from server.cli import _check_ranks
from server.engine.loader import check_ranks, check_stage, full_heads_of_ranks
from server.engine.stand_ins import build_emulation
from server.engine.variants.interface import Source
from server.engine.variants.low_rank import LowRank

KEPT = {"no_op": False, "emulation": None}
GONE = {"no_op": True, "emulation": None}


def block(attention, ffn=KEPT):
    return {"attention": attention, "ffn": ffn}


def context(*sources):
    return {"no_op": True, "emulation": {"kind": "context", "rank": 2, "sources": list(sources)}}


def kv_share(source):
    return {"no_op": True, "emulation": {"kind": "kv_share", "sources": [source]}}


def test_a_pipeline_stage_without_attention_is_refused_where_none_can_be_put_in():
    configs = [block(KEPT), block(KEPT), block(GONE), block(GONE)]
    for start, end in ((0, 4), (0, 2)):
        check_stage(configs, start, end, may_lack_attention=False)
    check_stage(configs, 2, 4, may_lack_attention=True)
    with pytest.raises(CheckpointError, match="blocks 2 to 3 has no attention layer left"):
        check_stage(configs, 2, 4, may_lack_attention=False)


def test_a_model_without_any_attention_is_refused():
    with pytest.raises(CheckpointError, match="the model has no attention layer left"):
        check_stage([block(GONE), block(GONE)], 0, 1, may_lack_attention=True)


@pytest.mark.parametrize("reader", [block(context(0)), block(KEPT, context(0))])
def test_a_source_in_another_pipeline_stage_is_refused(reader):
    configs = [block(KEPT), block(KEPT), block(KEPT), reader]
    check_stage(configs, 0, 4, may_lack_attention=True)
    with pytest.raises(CheckpointError, match="attention output of block 0, which another stage holds"):
        check_stage(configs, 2, 4, may_lack_attention=True)


def test_a_cache_in_another_pipeline_stage_is_refused():
    configs = [block(KEPT), block(KEPT), block(KEPT), block(kv_share(1))]
    check_stage(configs, 1, 4, may_lack_attention=True)
    with pytest.raises(CheckpointError, match="KV cache of block 1, which another stage holds"):
        check_stage(configs, 2, 4, may_lack_attention=True)


def test_full_heads_are_found_on_the_rank_that_holds_them():
    assert full_heads_of_ranks([0, 5], 8, 1) == [[0, 5]]
    assert full_heads_of_ranks([0, 5], 8, 2) == [[0], [1]]
    assert full_heads_of_ranks([1, 2, 5, 7], 8, 4) == [[1], [0], [1], [1]]
    assert full_heads_of_ranks([0, 1], 2, 4) == [[0], [0], [0], [0]]  # two ranks share a head


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [([0, 1], 8, 2), ([3], 4, 4), ([0], 2, 4), ([0, 2, 3], 4, 2)])
def test_ranks_with_unequal_numbers_of_full_heads_are_refused_before_the_engine_starts(
    tmp_path, heads, kv_heads, ranks
):
    window = {"window": {"size": 8, "sink": True, "full_heads": heads}}
    blocks = [block(GONE), block(KEPT | {"window": {"size": 8, "sink": False}}), block(KEPT | window)]
    fields = {"num_key_value_heads": kv_heads, "block_configs": blocks}
    check_ranks(fields, 1)
    with pytest.raises(CheckpointError, match="does not cut the windows by head evenly") as refused:
        check_ranks(fields, ranks)
    assert "\n" not in str(refused.value)
    check_ranks(fields | {"block_configs": blocks[:2]}, ranks)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError) as at_start:
        _check_ranks(str(tmp_path), ranks)
    assert (at_start.value.exit_code, str(at_start.value)) == (2, str(refused.value))


def test_ranks_that_do_not_divide_the_units_of_an_ffn_are_refused():
    fields = {"num_key_value_heads": 12, "block_configs": [block(KEPT), block(KEPT, KEPT | {"intermediate_size": 184})]}
    check_ranks(fields, 4)
    message = "--tensor-parallel-size 3 does not divide the 184 FFN units of block 1"
    with pytest.raises(CheckpointError, match=message):
        check_ranks(fields, 3)


def test_an_emulation_of_an_unknown_kind_is_refused():
    with pytest.raises(CheckpointError, match="'recurrent' is not known"):
        build_emulation({"kind": "recurrent", "rank": 2}, 8, fused=True)


def test_what_attention_hands_on_is_traced_into_one_graph_and_let_go():
    class Model(nn.Module):
        """An attention layer's place and two readers of it."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(8, 8)
            self.readers = nn.ModuleList(LowRank(8, 2, 1) for _ in range(2))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + self.attention(hidden)
            for reader in self.readers:
                hidden = hidden + reader(hidden)
            return hidden

    torch.manual_seed(0)
    model, source = Model().requires_grad_(False), Source(partial=False)
    model.attention.register_forward_hook(source)
    for reader in model.readers:
        reader.sources.append(source)
    model.readers[-1].last_reader_of.append(source)
    inputs = [torch.randn(5, 8) for _ in range(2)]
    expected = []
    for hidden in inputs:
        heard = model.attention(hidden)
        stream = hidden + heard
        for reader in model.readers:
            stream = stream + reader.up(reader.down(torch.cat([stream, heard], -1)))
        expected.append(stream)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, compiled):
        for hidden, wanted in zip(inputs, expected, strict=True):
            torch.testing.assert_close(run(hidden), wanted)
            assert source.output is None
