"""`prune-serve --draft`: a pruned checkpoint guesses, the dense model decides."""

import re
import urllib.request

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from pruning.plan import Plan, Sublayer
from tests.conftest import BLOCKS, export_pico, name_base, pico_model

pytestmark = pytest.mark.engine
PLAN = Plan(BLOCKS, {Sublayer(2, "attention"): "low_rank", Sublayer(4, "attention"): "none"}, rank=4)
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(3, 60, (20,), generator=generator).tolist()
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def dense(pico_directory):
    return pico_directory("llama")


@pytest.fixture(scope="module")
def server(dense, tmp_path_factory, start_server):
    draft = export_pico(pico_model("llama"), "llama", PLAN, tmp_path_factory.mktemp("draft") / "draft")
    name_base(draft, dense)
    engine = ["--max-model-len", 160, "--max-num-seqs", 8, "--max-num-batched-tokens", 256]
    log = tmp_path_factory.mktemp("server") / "log"
    with start_server(dense, log, "--draft", draft, "--draft-tokens", 2, engine=engine) as server:
        yield server


@pytest.fixture(scope="module")
def answers(server) -> list[list[int]]:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options = {"ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(
        model=server.model, prompt=prompts(), temperature=0, max_tokens=NEW_TOKENS, extra_body=options
    )
    return [choice.token_ids for choice in answer.choices]


def test_the_tokens_are_those_of_the_dense_model(answers, dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    for prompt, tokens in zip(prompts(), answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


def test_some_guesses_are_accepted_and_some_are_not(answers, server):
    with urllib.request.urlopen(f"{server.operations_url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = {sample.name: sample.value for family in families for sample in family.samples}
    accepted = samples["vllm:spec_decode_num_accepted_tokens_total"]
    guessed = samples["vllm:spec_decode_num_draft_tokens_total"]
    assert 0 < accepted < guessed
    assert guessed == 2 * samples["vllm:spec_decode_num_drafts_total"]


def test_the_cache_of_the_draft_counts(server):
    line = re.search(r"KV cache: (\d+) tokens \(the dense model would hold (\d+)", server.log.read_text())
    served, dense = map(int, line.groups())
    assert dense == served * (BLOCKS + BLOCKS - 2) // BLOCKS
