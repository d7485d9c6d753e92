"""The main job: export, serve, chat, measure, stop; with the real model, the real engine and a real client."""

import json
import re
import time
from pathlib import Path

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.models.checkpoint import verify

pytestmark = pytest.mark.engine

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a sentence about the sea.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
    "Explain photosynthesis in one sentence.",
    "Give me a recipe for pancakes.",
    "What is a prime number?",
    "Translate 'good morning' into French.",
    "Why do leaves fall in autumn?",
]
FRANCE = [{"role": "user", "content": QUESTIONS[0]}]


@pytest.fixture(scope="module")
def client(live_server):
    return openai.OpenAI(base_url=f"{live_server.url}/v1", api_key="none", max_retries=0)


def test_a_request_keeps_a_fraction_of_its_cache_at_the_loss_allowed_and_far_codes_are_found(smollm2_checkpoint):
    manifest = verify(smollm2_checkpoint)
    assert set(manifest.removed.values()) == {"window"}
    assert manifest.num_blocks == 30
    assert manifest.sizes["context"] == manifest.quality["row_tokens"] == 8192
    assert manifest.sizes["kv_request"] <= 0.4 * manifest.sizes["kv_request_dense"]
    assert manifest.quality["pruned_loss"] - manifest.quality["dense_loss"] <= 0.01
    codes, dense = manifest.quality["codes"], manifest.quality["codes_dense"]
    assert codes["length"] > manifest.recipe["window"]
    assert codes["found"] >= 0.9 * dense["found"]


def test_the_pruned_model_knows_the_capital_of_france(client, live_server):
    answer = client.chat.completions.create(model=live_server.model, messages=FRANCE, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content


def test_streaming_gives_the_same_text(client, live_server):
    options = {"model": live_server.model, "messages": FRANCE, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**options, stream=True)]
    assert "".join(parts) == whole
    assert len([p for p in parts if p]) > 3


def test_kv_cache_holds_twice_as_many_tokens_at_least(live_server):
    found = re.search(r"KV cache: ([\d,]+) tokens .*?([\d,]+)", live_server.log.read_text())
    pruned, dense = (int(number.replace(",", "")) for number in found.groups())
    assert pruned > 2 * dense
    engine = re.search(r"KV cache size: ([\d,]+) tokens", live_server.log.read_text())
    assert int(engine[1].replace(",", "")) == pruned


def test_metrics_are_exported(client, live_server):
    client.chat.completions.create(model=live_server.model, messages=FRANCE, max_tokens=4)
    text = client._client.get(f"{live_server.url}/metrics").text
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value
               for family in text_string_to_metric_families(text) for s in family.samples}  # fmt: skip
    kv = {labels: value for (name, labels), value in samples.items() if name == "shoal_kv_bytes_per_token"}
    assert 0.3 <= kv[(("variant", "served"),)] / kv[(("variant", "dense"),)] < 0.33  # a block for each window
    assert any(name == "vllm:request_success_total" and value > 0 for (name, _), value in samples.items())


def test_greedy_tokens_of_vllm_and_transformers_agree(client, live_server):
    tokenizer = AutoTokenizer.from_pretrained(live_server.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(live_server.checkpoint)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = client.completions.create(
            model=live_server.model, prompt=prompt, temperature=0, max_tokens=64,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        tokens = answer.choices[0].token_ids
        assert len(tokens) == 64
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        gap = logits.max(-1).values - logits[torch.arange(64), tokens]
        assert gap.max() < 1e-3, f"{question}: parts from transformers by {gap.max():.2e}"


def test_the_server_says_what_was_pruned(client, live_server, smollm2_checkpoint):
    answer = client._client.get(f"{live_server.url}/v1/pruning").json()
    assert answer["kv_cache"]["tokens"] > 2 * answer["kv_cache"]["tokens_dense"]
    limited = [number for number, block in enumerate(answer["sublayers"]) if block["attention"] == "limited"]
    assert {f"attention.{number}" for number in limited} == verify(smollm2_checkpoint).removed.keys()


def test_errors_are_those_openai_clients_expect(client, live_server):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=FRANCE)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=live_server.model, messages=FRANCE, temperature=-3)
    with pytest.raises(openai.APIStatusError, match="body has more"):
        client.completions.create(model=live_server.model, prompt="x" * (5 * 2**20))
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        client.embeddings.create(model=live_server.model, input="x")


def test_structured_output_and_logprobs(client, live_server):
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model=live_server.model, messages=FRANCE, temperature=0, max_tokens=64, logprobs=True, top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )  # fmt: skip
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}
    assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)


def test_the_live_scrape_has_every_documented_metric(client, live_server):
    documented = re.findall(
        r"^\| `(shoal_\w+)`", (Path(__file__).parents[2] / "docs/use/metrics.md").read_text(), re.MULTILINE
    )
    text = client._client.get(f"{live_server.url}/metrics").text
    assert [name for name in documented if f"# TYPE {name}" not in text] == []


def test_a_checkpoint_that_was_tampered_with_is_not_served(smollm2_checkpoint, tmp_path):
    import shutil
    import subprocess
    import sys

    damaged = shutil.copytree(smollm2_checkpoint, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    config["rms_norm_eps"] *= 10
    (damaged / "config.json").write_text(json.dumps(config))
    command = [Path(sys.executable).with_name("prune-serve"), damaged, "--port", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "config.json does not match its SHA-256" in done.stderr.strip().splitlines()[-1]


def test_tools_get_a_clear_error_where_the_model_has_no_tool_template(client, live_server):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tool"):
        client.chat.completions.create(model=live_server.model, messages=FRANCE, tools=[tool])


def test_the_models_list_says_what_was_removed(client, live_server, smollm2_checkpoint):
    (model,) = client.models.list().data
    assert model.id == live_server.model
    assert len(model.pruning["attention_limited"]) == len(verify(smollm2_checkpoint).removed)
    assert model.pruning["attention_removed"] == []
    assert model.pruning["kv_heads"]["limited"] > 3 * model.pruning["kv_heads"]["full"] > 0
    assert model.pruning["kv_bytes_per_token"] < 0.33 * model.pruning["kv_bytes_per_token_dense"]


def wait(truth, seconds=30):
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_client_that_goes_away_frees_its_cache(client, live_server):
    def value(name: str) -> float:
        text = client._client.get(f"{live_server.url}/metrics").text
        return sum(float(found) for found in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    tasks = value("shoal_event_loop_tasks")
    streams = [
        client.completions.create(
            model=live_server.model, prompt=f"{i} fish", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        for i in range(8)
    ]
    for stream in streams:
        next(iter(stream))
    wait(lambda: value("vllm:num_requests_running") == 8 and value("vllm:kv_cache_usage_perc") > 0)
    for stream in streams:
        stream.close()
    wait(lambda: value("vllm:num_requests_running") + value("vllm:kv_cache_usage_perc") == 0)
    wait(lambda: value("shoal_event_loop_tasks") <= tasks + 1)
