"""Which parser fits a chat template; the templates are cut from those of published models."""

import json

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from server.cli import _parsers
from server.parsers import REASONING, TOOL_CALLS, chosen, read_model_type, read_template
from server.settings import Settings

QWEN25 = r"""{%- if tools %}{{- "<tools>" }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- "</tools>\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
QWEN3 = QWEN25 + r"""{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"""
QWEN3_INSTRUCT = (
    QWEN25 + r"""{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"""
)
QWEN3_THINKING = (
    QWEN3_INSTRUCT + r"""{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""
)
QWEN3_CODER = r"""{%- for tool in tools %}{{ tool.name }}{%- endfor %}
{{- '<tool_call>\n<function=example>\n<parameter=a>\nvalue\n</parameter>\n</function>\n</tool_call> arguments' }}"""
LLAMA31 = r"""{%- if tools is not none %}{{- "Environment: ipython\n" }}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name}.' }}{%- endif %}
{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}"""
MISTRAL = r"""{%- if tools is defined %}{{ "[AVAILABLE_TOOLS]" }}{{ tools }}{%- endif %}{{ "[TOOL_CALLS]" }}"""
GRANITE = r"""{%- if tools %}<|start_of_role|>tools{{ tools | tojson }}{%- endif %} write <|tool_call|> first.
{%- if thinking %}Write your thoughts after 'Here is my thought process:' and then the response.{%- endif %}"""
PHI4 = r"""{% if 'tools' in message %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}"""
DISTILLED = r"""{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'}}{{'<｜Assistant｜><think>\n'}}"""
SMOLLM2 = r"""{% for message in messages %}{{ message['content'] }}{% endfor %}"""
GENERATING = QWEN25 + "{% generation %}{{ content }}{%- endgeneration -%}{% for m in messages %}{% break %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "model_type", "tools", "reasoning"),
    [
        (QWEN25, "qwen2", "hermes", None),
        (QWEN3, "qwen3", "hermes", "qwen3"),
        (QWEN3_INSTRUCT, "qwen3", "hermes", None),
        (QWEN3_THINKING, "qwen3_moe", "hermes", "qwen3"),
        (QWEN3_CODER, "qwen3_moe", "qwen3_coder", None),
        (LLAMA31, "llama", "llama3_json", None),
        (MISTRAL, "mistral", "mistral", None),
        (GRANITE, "granite", "granite", "granite"),
        (PHI4, "phi3", None, None),
        (DISTILLED, "llama", None, "deepseek_r1"),
        (SMOLLM2, "llama", None, None),
        (GENERATING, "qwen2", "hermes", None),
        ("{% broken <tool_call> arguments", "qwen2", None, None),
        ("", "llama", None, None),
    ],
)
def test_the_parser_that_fits(template, model_type, tools, reasoning):
    assert chosen(TOOL_CALLS, template, model_type) == tools
    assert chosen(REASONING, template, model_type) == reasoning


def test_vllm_has_every_parser_of_the_table():
    assert {rule.parser for rule in TOOL_CALLS} <= set(ToolParserManager.list_registered())
    assert {rule.parser for rule in REASONING} <= set(ReasoningParserManager.list_registered())


def test_the_template_is_found_where_transformers_puts_it(tmp_path):
    assert read_template(tmp_path) == ""
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert read_template(tmp_path) == "one"
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert read_template(tmp_path) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_template(tmp_path) == "file"
    config.write_text("no json")
    assert read_template(tmp_path) == "file"


def test_settings_and_another_template_override(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "depth_pruned_qwen3"}')
    (tmp_path / "chat_template.jinja").write_text(QWEN3)
    other = tmp_path / "other.jinja"
    other.write_text(MISTRAL)
    assert read_model_type(tmp_path) == "qwen3"
    assert _parsers(str(tmp_path), None, Settings()) == ("hermes", "qwen3")
    assert _parsers(str(tmp_path), str(other), Settings()) == ("mistral", None)
    assert _parsers(str(tmp_path), None, Settings(tool_call_parser="none", reasoning_parser="mine")) == (None, "mine")
