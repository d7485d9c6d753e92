"""One server with everything on that a production server has on, and its end by a dead engine.

TLS, keys with limits, token limits, two API processes, a port for operations, JSON logs, traces, a LoRA adapter.
"""

import json
import os
import re
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import psutil
import pytest
import torch
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from peft import LoraConfig, PeftModel, get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.engine
SECRET = "a prompt nobody may log"


@pytest.fixture(scope="module")
def collector():
    """A local OpenTelemetry collector: the spans it was sent."""
    spans = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1/traces", spans
        http.shutdown()


@pytest.fixture(scope="module")
def adapter(pico_checkpoint, tmp_path_factory):
    """A LoRA adapter trained on (that is: drawn for) the tiny pruned checkpoint."""
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    directory = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(pico_checkpoint("llama")[0]), config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hardened(pico_checkpoint, adapter, collector, start_server, tmp_path_factory):
    place = tmp_path_factory.mktemp("hardened")
    keys, certificate, key = place / "keys", place / "tls.crt", place / "tls.key"
    keys.write_text("free:k-free\nslow:k-slow requests_per_minute=2\nsmall:k-small tokens_per_minute=10\n")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    flags = ["--api-keys-file", keys, "--log-format", "json", "--max-prompt-tokens", 100, "--max-output-tokens", 40]
    engine = ["--max-model-len", 256, "--api-server-count", 2, "--ssl-certfile", certificate, "--ssl-keyfile", key,
              "--otlp-traces-endpoint", collector[0], "--enable-lora", "--max-lora-rank", 8,
              "--lora-modules", f"wave={adapter}"]  # fmt: skip
    checkpoint, log = pico_checkpoint("llama")[0], place / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with start_server(checkpoint, log, *flags, engine=engine, scheme="https", operations=True) as server:
            server.keys, server.tls = keys, ssl.create_default_context(cafile=str(certificate))
            # Ready is what one process says of itself; requests reach both.
            ready = {"name": "shoal.lifecycle", "message": "ready"}
            wait_until(lambda: len({line["process"] for line in logged(server, ready)}) == 2)
            yield server


def logged(server, fields: dict[str, str]) -> list[dict]:
    """Lines of the server's JSON log that have these values."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if fields.items() <= line.items()]


def wait_until(truth: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def client(server, key: str | None = "k-free") -> httpx2.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx2.Client(base_url=server.url, verify=server.tls, headers=headers, timeout=60)


def complete(server, http: httpx2.Client, **fields) -> httpx2.Response:
    body = {"model": server.model, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body | fields)


def samples(server) -> dict[str, float]:
    """Sum over all labels of each sample's name."""
    with client(server, None) as http:
        text = http.get(f"{server.operations_url}/metrics").text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def test_a_key_is_needed_but_not_for_the_page(hardened):
    with client(hardened, None) as http:
        assert complete(hardened, http).status_code == 401
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/pruning").status_code == 401
        assert http.get("/").status_code == 200
    with client(hardened) as http:
        assert complete(hardened, http).status_code == 200


def test_health_and_metrics_are_on_their_own_port_only(hardened):
    with client(hardened) as http:
        assert http.get("/metrics").status_code == 404
        assert http.get("/health/live").status_code == 404
        assert http.get(f"{hardened.operations_url}/health/live").status_code == 200
        assert http.get(f"{hardened.operations_url}/v1/models").status_code == 404


def test_prompts_over_the_limit_get_400_streamed_or_not(hardened):
    with client(hardened) as http:
        assert complete(hardened, http, prompt=[9] * 100).status_code == 200
        for stream in (False, True):
            answer = complete(hardened, http, prompt=[9] * 101, stream=stream)
            assert answer.status_code == 400
            assert "has 101 tokens; this server takes at most 100" in answer.json()["error"]["message"]
        chat = {"model": hardened.model, "messages": [{"role": "user", "content": "x" * 101}]}
        assert http.post("/v1/chat/completions", json=chat).status_code == 400


@pytest.mark.parametrize("asked", [41, None])
def test_answers_end_at_the_limit(hardened, asked):
    with client(hardened) as http:
        answer = complete(hardened, http, max_tokens=asked).json()
    wanted = 40 if asked else 16  # vLLM's own default for completions
    assert answer["usage"]["completion_tokens"] == wanted
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_key_over_its_requests_gets_429_and_when_to_try_again(hardened):
    with client(hardened, "k-slow") as http:
        answers = [complete(hardened, http) for _ in range(4)]
    assert answers[0].status_code == 200
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 2
    assert 1 <= int(refused[0].headers["retry-after"]) <= 60
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"


def test_the_openai_client_raises_its_own_errors_for_401_and_429(hardened):
    def api(key: str) -> openai.OpenAI:
        web = httpx2.Client(verify=hardened.tls)
        return openai.OpenAI(base_url=f"{hardened.url}/v1", api_key=key, max_retries=0, http_client=web)

    with pytest.raises(openai.AuthenticationError):
        api("wrong").models.list()
    slow = api("k-slow")
    with pytest.raises(openai.RateLimitError):
        [slow.completions.create(model=hardened.model, prompt="x", max_tokens=1) for _ in range(3)]


def test_a_key_over_its_tokens_gets_429(hardened):
    with client(hardened, "k-small") as http:
        answers = [complete(hardened, http, max_tokens=10) for _ in range(3)]
        streamed = complete(hardened, http, stream=True)
    assert answers[0].status_code == 200
    assert [answers[-1].status_code, streamed.status_code] == [429, 429]
    assert "tokens per minute" in answers[-1].json()["error"]["message"]


def test_a_new_key_works_without_a_restart(hardened):
    with client(hardened, "k-new") as http:
        assert complete(hardened, http).status_code == 401
        hardened.keys.write_text(hardened.keys.read_text() + "new:k-new\n")
        assert complete(hardened, http).status_code == 200


def test_metrics_are_those_of_both_processes(hardened):
    before = samples(hardened)
    clients = [client(hardened) for _ in range(6)]
    for http in clients:  # connections that stay open, so that each process gets some
        assert complete(hardened, http).status_code == 200
    after = samples(hardened)
    for http in clients:
        http.close()
    assert len({line["process"] for line in logged(hardened, {"name": "shoal.access"})}) == 2
    for name in ("shoal_admission_accepted_total", "vllm:request_success_total"):
        assert after[name] - before[name] == 6, name
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 24
    capacity = int(re.search(r"KV cache: (\d+) tokens", hardened.log.read_text())[1])
    engine = re.search(r"KV cache size: ([\d,]+) tokens", hardened.log.read_text())
    assert int(engine[1].replace(",", "")) == capacity
    assert after["shoal_kv_cache_capacity_tokens"] == capacity + capacity * 2 // 6  # served and dense; 2 of 6 are left
    assert after["shoal_ready"] == 1
    assert after["shoal_process_resident_memory_bytes"] > 2**29


def test_logs_are_json_with_request_ids_and_without_prompts(hardened):
    with client(hardened) as http:
        answer = http.post(
            "/v1/completions", json={"model": hardened.model, "prompt": SECRET}, headers={"X-Request-Id": "log-1"}
        )
    assert answer.headers["x-request-id"] == "log-1"
    assert answer.json()["id"] == "cmpl-log-1"
    access = {"name": "shoal.access", "request_id": "log-1"}
    wait_until(lambda: bool(logged(hardened, access)))  # it is written after the answer's last byte
    assert SECRET not in hardened.log.read_text()
    (line,) = logged(hardened, access)
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)


def test_a_span_of_a_request_reaches_the_collector(hardened, collector):
    body = {"model": hardened.model, "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
    with client(hardened) as http:
        assert http.post("/v1/completions", json=body, headers={"X-Request-Id": "trace-1"}).status_code == 200
    mine, deadline = [], time.monotonic() + 20
    while not mine and time.monotonic() < deadline:
        time.sleep(0.2)
        found = [{a.key: a.value for a in span.attributes} for span in list(collector[1])]
        mine = [a for a in found if "gen_ai.request.id" in a and "trace-1" in a["gen_ai.request.id"].string_value]
    assert mine, f"none of {len(collector[1])} spans is of this request"
    assert mine[0]["gen_ai.usage.completion_tokens"].int_value == 3


def test_an_adapter_is_asked_for_by_name(hardened, adapter):
    prompt = [11, 23, 35, 47, 59, 71]
    with client(hardened) as http:
        listed = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
        answer = complete(hardened, http, model="wave", prompt=prompt, max_tokens=12, return_token_ids=True).json()
        plain = complete(hardened, http, prompt=prompt, max_tokens=12, return_token_ids=True).json()
    assert listed["wave"]["parent"] == hardened.model
    assert listed[hardened.model]["pruning"]["attention_removed"] == [0, 2, 3, 4]
    tokens = answer["choices"][0]["token_ids"]
    assert tokens != plain["choices"][0]["token_ids"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hardened.checkpoint), adapter)
    with torch.inference_mode():
        logits = adapted(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    gap = logits.max(-1).values - logits[torch.arange(len(tokens)), tokens]
    assert gap.max() < 1e-3


def test_zz_a_killed_engine_ends_every_open_request_with_an_error_and_the_process_with_1(hardened):
    clients = [client(hardened) for _ in range(6)]
    endings: list[str] = []

    def stream(http: httpx2.Client) -> None:
        body = {"model": hardened.model, "prompt": [5], "max_tokens": 40, "ignore_eos": True, "stream": True, "n": 8}
        try:
            while True:
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    lines = [line for line in answer.iter_lines() if line]
                if answer.status_code != 200 or any('"error"' in line for line in lines[-2:]):
                    endings.append("told")
                    return
                if lines[-1] != "data: [DONE]":
                    endings.append("cut off")
                    return
        except httpx2.HTTPError as error:
            endings.append(repr(error))

    threads = [threading.Thread(target=stream, args=(http,)) for http in clients]
    for thread in threads:
        thread.start()
    time.sleep(1)
    engine = next(p for p in psutil.Process(hardened.process.pid).children(recursive=True)
                  if "EngineCore" in " ".join(p.cmdline()[:1]))  # fmt: skip
    os.kill(engine.pid, signal.SIGKILL)
    assert hardened.process.wait(60) == 1
    for thread in threads:
        thread.join(10)
    assert endings == ["told"] * 6
