"""What clients get from a real server where they ask for something wrong, too much, or by another method."""

import gzip
import json
import shutil
import time

import httpx2
import openai
import pytest

from server.requests.fields import FIELDS
from tests.conftest import rewrite_manifest

pytestmark = pytest.mark.engine

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


# As that of Qwen 2.5, without what it tells the model about them.
TEMPLATE = (
    "{% if tools and false %}<tool_call>arguments</tool_call>{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def server(pico_checkpoint, start_server, tmp_path_factory):
    # No grammar compiles in a millisecond: that is how the deadline is seen.
    flags = ["--cors-origins", "https://good.example", "--grammar-seconds", 0.001]
    place = tmp_path_factory.mktemp("conformance")
    checkpoint = shutil.copytree(pico_checkpoint("llama")[0], place / "llama-with-tools")
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    rewrite_manifest(checkpoint)
    with start_server(checkpoint, place / "log", *flags, engine=["--max-model-len", 256]) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def api(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def refused(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def chat(server, content="x", **fields) -> dict:
    return {"model": server.model, "messages": [{"role": "user", "content": content}], "max_tokens": 4} | fields


def text(server, prompt="x", **fields) -> dict:
    return {"model": server.model, "prompt": prompt, "max_tokens": 4} | fields


@pytest.mark.parametrize(
    ("route", "fields", "flag"),
    [
        ("chat/completions", {"n": 10000}, "--max-choices"),
        ("chat/completions", {"n": 17, "stream": True}, "--max-choices"),
        ("completions", {"n": 10000}, "--max-choices"),
        ("completions", {"prompt": ["x"] * 1000}, "--max-sequences"),
        ("completions", {"prompt_logprobs": 20}, "--max-prompt-logprobs"),
        ("completions", {"prompt_logprobs": -1}, "--max-prompt-logprobs"),
        ("completions", {"logprobs": 300}, "--max-top-logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "--max-top-logprobs"),
        ("chat/completions", {"stop": ["x"] * 1000}, "--max-stops"),
        ("chat/completions", {"logit_bias": {str(i): 1 for i in range(2000)}}, "--max-logit-bias"),
        ("chat/completions", {"tools": [WEATHER] * 200}, "--max-tools"),
        ("completions", {"structured_outputs": {"regex": "(a|b)" * 20000}}, "--max-grammar-bytes"),
        ("responses", {"input": "x", "top_logprobs": 100}, "--max-top-logprobs"),
    ],
)
def test_what_costs_too_much_is_refused_before_the_engine(server, http, route, fields, flag):
    bodies = {"chat/completions": chat(server), "completions": text(server), "responses": {"model": server.model}}
    body = bodies[route] | fields
    start = time.monotonic()
    error = refused(http.post(f"/v1/{route}", json=body), 400)
    assert time.monotonic() - start < 2
    assert flag in error["message"]
    assert error["code"] == "over_limit"


def test_what_is_allowed_is_served(server, http):
    answer = http.post("/v1/chat/completions", json=chat(server, n=16, logprobs=True, top_logprobs=20))
    assert len(answer.json()["choices"]) == 16
    answer = http.post("/v1/completions", json=text(server, ["x"] * 4, n=4, prompt_logprobs=5))
    assert len(answer.json()["choices"]) == 16


def test_a_grammar_past_its_deadline_is_a_400(server, http, api):
    def wanted(name: str) -> dict:  # a schema of its own each time: compiled ones are kept
        schema = {"enum": [f"{name}-{i}" for i in range(2000)]}
        return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}

    error = refused(http.post("/v1/chat/completions", json=chat(server, response_format=wanted("a"))), 400)
    assert "schema or grammar" in error["message"]
    with pytest.raises(openai.APIError, match="schema or grammar"):
        list(api.chat.completions.create(**chat(server, response_format=wanted("b"), stream=True)))
    assert http.post("/v1/chat/completions", json=chat(server)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/moderations", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health/live", 405),
    ],
)
def test_paths_and_methods_that_are_not_there(http, method, path, status):
    answer = http.request(method, path, json={} if method == "POST" else None)
    refused(answer, status)
    assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{}", {"content-type": "text/plain"}, 415, "must be application/json, not 'text/plain'"),
        (b"{}", {}, 415, "no content type"),
        (gzip.compress(b"{}"), {"content-encoding": "gzip", "content-type": "application/json"}, 415, "gzip"),
        (b"[" * 50_000 + b"]" * 50_000, {"content-type": "application/json"}, 400, "nested deeper than"),
        (b'{"model": ', {"content-type": "application/json"}, 400, "not valid JSON"),
        (b'{"temperature": NaN}', {"content-type": "application/json"}, 400, "NaN"),
        (b"x" * (5 * 2**20), {"content-type": "application/json"}, 413, "more than 4194304 bytes"),
        (b"", {"content-type": "application/json"}, 400, "the body is missing"),
        (b"[]", {"content-type": "application/json"}, 400, "the body must be an object, not a list"),
    ],
)
def test_bodies_that_are_no_json(http, body, headers, status, words):
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        assert words in refused(http.post(route, content=body, headers=headers), status)["message"]


def test_messages_name_the_field(server, http):
    error = refused(http.post("/v1/chat/completions", json=chat(server, None)), 400)
    assert error["message"] == "`messages[0].content` must be a string or a list, not null"
    body = json.dumps(chat(server, "half \ud800"))
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert "`messages[0].content` has half of a surrogate pair" in refused(answer, 400)["message"]
    error = refused(http.post("/v1/chat/completions", json=chat(server) | {"model": "other"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_fields_that_are_ignored_pass_and_those_that_cannot_be_honoured_do_not(server, http):
    values = {"metadata": {"a": "b"}, "prediction": {"type": "content", "content": "x"}, "image": {},
              "prompt_cache_options": {"ttl": "30m"}, "store": True, "access_programs": {}, "background_options": {},
              "context_management": [{"type": "compaction"}], "max_tool_calls": 3, "stream_options": None}  # fmt: skip
    bodies = {"/v1/chat/completions": chat(server), "/v1/completions": text(server),
              "/v1/responses": {"model": server.model, "input": "x", "max_output_tokens": 4}}  # fmt: skip
    for route, fields in FIELDS.items():
        ignored = {name: values.get(name, "low") for name, field in fields.items() if field.state == "ignored"}
        answer = http.post(route, json=bodies[route] | ignored)
        assert answer.status_code == 200, answer.text
        for name in (name for name, field in fields.items() if field.state == "refused"):
            assert refused(http.post(route, json=bodies[route] | {name: "x"}), 400)["param"] == name


def test_supported_fields_do(server, http):
    everything = {
        "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 1, "temperature": 0.5, "top_p": 0.9, "n": 2,
        "stop": ["zzz"], "logit_bias": {"5": 1},
    }  # fmt: skip
    more = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3, "reasoning_effort": "low",
            "parallel_tool_calls": False, "response_format": {"type": "text"}, "tool_choice": "none"}  # fmt: skip
    answer = http.post("/v1/chat/completions", json=chat(server) | everything | more | {"tools": [WEATHER]})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2
    answer = http.post("/v1/completions", json=text(server) | everything | {"logprobs": 2, "echo": True})
    assert answer.status_code == 200, answer.text
    body = {"model": server.model, "input": "x", "max_output_tokens": 4, "instructions": "y", "temperature": 0.5,
            "metadata": {"a": "b"}, "top_p": 0.9, "truncation": "auto", "service_tier": "flex", "tools": [],
            "parallel_tool_calls": True, "text": {"format": {"type": "text"}}, "top_logprobs": 1,
            "include": ["message.output_text.logprobs"], "reasoning": {"effort": "low"}}  # fmt: skip
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text


def test_a_part_that_vllm_only_asserts_about_is_a_400(server, http):
    file = {"type": "input_file", "file_data": None, "file_id": None, "file_url": None, "filename": None,
            "detail": None, "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}  # fmt: skip
    item = {"type": "function_call_output", "call_id": None, "id": "", "status": "completed", "output": [file]}
    refused(http.post("/v1/responses", json={"model": server.model, "input": [item]}), 400)


def test_a_stream_of_a_wrong_request_ends_with_an_error(server, api):
    stream = api.responses.create(model=server.model, input="x", stream=True, extra_body={"stop_token_ids": [2**40]})
    with pytest.raises(openai.APIError, match="out-of-vocab"):
        list(stream)


def test_browsers_of_other_origins_are_refused_in_json(http):
    ask = {"Origin": "https://bad.example", "Access-Control-Request-Method": "POST"}
    assert "CORS" in refused(http.options("/v1/completions", headers=ask), 400)["message"]
    answer = http.get("/v1/nothing", headers={"Origin": "https://good.example"})
    assert answer.headers.get_list("access-control-allow-origin") == ["https://good.example"]


def test_models_versions_and_head(server, http, api):
    assert api.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.models.retrieve("other")
    assert str(server.checkpoint.parent) not in http.get("/v1/models").text
    assert set(http.get("/version").json()) == {"version", "shoal"}
    assert http.get("/openapi.json").json()["info"]["title"] == "Shoal"
    for path in ("/", "/v1/models", f"/v1/models/{server.model}", "/version", "/health", "/metrics", "/openapi.json"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path


def test_the_parser_of_tool_calls_is_picked_by_the_template(server, http):
    assert "Parsers: tool calls hermes, reasoning none" in server.log.read_text()
    assert http.post("/v1/chat/completions", json=chat(server, tools=[WEATHER])).status_code == 200
    named = {"type": "function", "function": {"name": "weather"}}
    answer = http.post("/v1/chat/completions", json=chat(server, tools=[WEATHER], tool_choice=named))
    assert "parser" not in answer.text
