"""What a request declares that it will cost."""

from dataclasses import replace

import pytest

from server.errors import Refusal
from server.requests.costs import Limits, check, sequences
from server.settings import Settings

LIMITS = Limits(16, 256, 20, 5, 16, 1024, 2**16, 128, 128)
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_the_limits_are_the_settings_defaults():
    settings = Settings()
    assert Limits(**{name: getattr(settings, f"max_{name}") for name in Limits.__slots__}) == LIMITS


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (CHAT, 1),
        (CHAT | {"n": 16}, 16),
        (CHAT | {"n": "16"}, 16),
        (CHAT | {"n": None}, 1),
        (CHAT | {"n": 0}, 1),
        (CHAT | {"n": -5}, 1),
        ({"prompt": "x"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": ["a", "b", "c"], "n": 2, "best_of": 4}, 12),
        ({"messages": [CHAT["messages"], CHAT["messages"]]}, 2),
        ({"input": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, 1),
        ({"input": ["x", "y"]}, 2),
        ({"query": "x", "documents": ["a", "b"]}, 2),
        (CHAT | {"documents": ["a", "b"]}, 1),
        ({"token_ids": [1], "sampling_params": {"n": 7}}, 7),
        ([1, 2], 1),
        ("x", 1),
    ],
)
def test_sequences_are_choices_times_prompts(body, count):
    assert sequences(body) == count


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("n", 17, "--max-choices"),
        ("n", 10000, "--max-choices"),
        ("n", "10000", "--max-choices"),
        ("n", 10**400, "--max-choices"),
        ("best_of", 17, "--max-choices"),
        ("prompt", ["x"] * 257, "--max-sequences"),
        ("prompt", [[1]] * 257, "--max-sequences"),
        ("messages", [CHAT["messages"]] * 257, "--max-sequences"),
        ("top_logprobs", 21, "--max-top-logprobs"),
        ("top_logprobs", -1, "--max-top-logprobs"),
        ("logprobs", 21, "--max-top-logprobs"),
        ("logprob_token_ids", list(range(21)), "--max-top-logprobs"),
        ("prompt_logprobs", 6, "--max-prompt-logprobs"),
        ("prompt_logprobs", -1, "--max-prompt-logprobs"),
        ("stop", ["x"] * 17, "--max-stops"),
        ("stop_token_ids", [1] * 17, "--max-stops"),
        ("bad_words", ["x"] * 17, "--max-stops"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "--max-logit-bias"),
        ("allowed_token_ids", list(range(1025)), "--max-logit-bias"),
        ("tools", [{}] * 129, "--max-tools"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 2**16]}}},
         "--max-grammar-bytes"),
        ("structured_outputs", {"regex": "a" * 2**16}, "--max-grammar-bytes"),
        ("structured_outputs", {"choice": ["a" * 100] * 1000}, "--max-grammar-bytes"),
        ("tools", [{"function": {"parameters": {"enum": ["x" * 2**15]}}}] * 2, "--max-grammar-bytes"),
    ],
)  # fmt: skip
def test_what_is_over_a_limit_is_refused_by_name(field, value, flag):
    with pytest.raises(Refusal) as caught:
        check(CHAT | {field: value}, 2**20, LIMITS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "over_limit", field)
    assert caught.value.text.startswith(f"`{field}` asks for ")
    assert flag in caught.value.text


def test_a_long_pattern_to_look_for_after_every_token_is_refused():
    check({"repetition_detection": {"max_pattern_size": 128, "min_count": 2}}, 100, LIMITS)
    with pytest.raises(Refusal, match=r"`repetition_detection.max_pattern_size` asks for 5000 .*--max-pattern-size"):
        check({"repetition_detection": {"max_pattern_size": 5000, "min_count": 2}}, 100, LIMITS)


def test_echo_with_logprobs_asks_for_those_of_the_prompt():
    check({"prompt": "x", "logprobs": 20}, 100, LIMITS)
    with pytest.raises(Refusal, match="--max-prompt-logprobs"):
        check({"prompt": "x", "logprobs": 6, "echo": True}, 100, LIMITS)


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 0}, {"sampling_params": {"prompt_logprobs": 1}},
                                    {"prompt": "x", "logprobs": 0, "echo": True}])  # fmt: skip
def test_nothing_of_a_prompt_is_scored_where_the_engine_would_end_on_it(fields):
    check(fields, 100, LIMITS)
    with pytest.raises(Refusal, match=r"logprobs` scores the prompt, .*--enable-lora") as caught:
        check(fields, 100, replace(LIMITS, prompt_logprobs=None))
    assert (caught.value.status, caught.value.code) == (400, "unsupported_field")
    check({"prompt": "x", "logprobs": 2, "prompt_logprobs": None}, 100, replace(LIMITS, prompt_logprobs=None))


def test_sampling_parameters_of_the_token_route_are_seen():
    with pytest.raises(Refusal, match=r"`sampling_params.n` asks for 99 choices"):
        check({"token_ids": [1], "sampling_params": {"n": 99}}, 100, LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 16}, {"n": None, "stop": None, "tools": None}, {"logprobs": True, "top_logprobs": 20},
        {"stop": "x" * 1000}, {"stop": ["x"] * 16}, {"tools": [{}] * 128}, {"prompt_logprobs": 5}, {"n": "many"},
        {"prompt": ["x"] * 256}, {"prompt": ["x"] * 16, "n": 16}, {"text": "x" * 2**17}, {"sampling_params": 5},
    ],
)  # fmt: skip
def test_what_is_within_the_limits_passes(fields):
    check(CHAT | fields, 2**20, LIMITS)
