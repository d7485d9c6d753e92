"""What is said where vLLM is asked to hand its KV cache to another machine."""

import json
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pruning.models.checkpoint import verify
from server.engine.compat import engine_facts
from server.inventory import NOTHING_SAVED, take_inventory


def inventory_of(checkpoint, *flags):
    """What the server would say of a checkpoint under vLLM's flags, in a pool of 64 blocks."""
    base = [str(checkpoint), "--skip-tokenizer-init", "--load-format", "dummy", "--block-size", "16"]
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", *base, *flags])
    config = EngineArgs.from_cli_args(parsed).create_engine_config()
    config.cache_config.num_gpu_blocks = 64
    facts = engine_facts(SimpleNamespace(vllm_config=config, model_config=config.model_config))
    return take_inventory(checkpoint, verify(checkpoint), facts)


@pytest.mark.parametrize(
    ("connector", "warned"), [(None, ()), ("OffloadingConnector", ()), ("ExampleConnector", (NOTHING_SAVED,))]
)
def test_a_connector_that_turns_the_hybrid_manager_off_is_warned_about(pico_checkpoint, connector, warned):
    checkpoint, _ = pico_checkpoint("llama window")
    flags = ["--kv-transfer-config", json.dumps({"kv_connector": connector, "kv_role": "kv_both"})]
    inventory = inventory_of(checkpoint, *(flags if connector else []))
    assert inventory.warnings == warned
    saved = [each.request_bytes < each.request_bytes_dense for each in inventory.contexts]
    assert saved == [not warned] * len(saved)
