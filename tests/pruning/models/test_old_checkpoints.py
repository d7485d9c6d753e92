"""Checkpoints of earlier releases are read as they were written.

`tests/data/checkpoint-0.1.0` was written by release 0.1.0 (commit d899edb) from tiny random Llamas: `mixed` has biases,
low-rank, context and both kinds of kv_share adapters, and sublayers that are simply gone; in `shared` blocks 2 and 4
have the weights of others. Beside each are the logits that release computed, and what it wrote greedily.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pruning
from pruning.models.checkpoint import verify

OLD = Path(__file__).parents[2] / "data/checkpoint-0.1.0"


@pytest.mark.parametrize("name", ["mixed", "shared"])
def test_a_checkpoint_of_0_1_0_gives_the_same_logits(name):
    assert pruning.__version__
    manifest = verify(OLD / name)
    assert manifest.shoal_version == "0.1.0"
    kinds = {"bias", "context", "kv_share", "kv_share_low_rank", "low_rank", "none"}
    assert set(manifest.removed.values()) == (kinds if name == "mixed" else {"shared"})
    model, loading = AutoModelForCausalLM.from_pretrained(OLD / name, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(OLD / f"{name}-logits.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(expected["ids"][:, :8], **options), expected["written"])
