"""Which of vLLM's parsers reads tool calls and reasoning out of a model's answers: by what its chat template writes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

AUTO, NONE = "auto", "none"
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag
Marks = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A parser, and what a chat template must have for it.

    Attributes:
        parser: vLLM's name of it.
        marks: Texts that are all in the template.
        variable: Variable that the template reads.
        families: Model types it holds for; empty: all.
    """

    parser: str
    marks: Marks
    variable: str | None = "tools"
    families: Marks = ()


# The first that fits counts. A template that never shows the tools to the model fits none, whatever it writes.
TOOL_CALLS = (
    Rule("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    Rule("glm45", ("<tool_call>", "<arg_key>")),
    Rule("hermes", ("<tool_call>", "arguments")),
    Rule("granite", ("<|tool_call|>",), families=("granite",)),
    Rule("mistral", ("[TOOL_CALLS]",)),
    Rule("llama3_json", ("ipython", "parameters"), families=("llama",)),
    Rule("cohere_command3", ("<|START_ACTION|>",)),
    Rule("functiongemma", ("<start_function_call>",)),
)
QWEN = ("qwen3", "qwen3_moe")
REASONING = (
    Rule("qwen3", ("<think>", "</think>"), "enable_thinking", QWEN),
    Rule("qwen3", ("assistant\\n<think>\\n",), None, QWEN),
    Rule("deepseek_r1", ("<｜Assistant｜><think>\\n",), None),
    Rule("granite", ("Here is my thought process:",), "thinking", ("granite",)),
)


def chosen(rules: tuple[Rule, ...], template: str, model_type: str) -> str | None:
    """Name of the parser that fits a template, None where none does."""
    variables = _variables(template)
    for rule in rules:
        fits = all(mark in template for mark in rule.marks) and (not rule.families or model_type in rule.families)
        if fits and (rule.variable is None or rule.variable in variables):
            return rule.parser
    return None


def read_template(directory: Path) -> str:
    """The chat template of a model directory, of several the one for tools; empty where there is none."""
    for path in (directory / "chat_template.jinja", directory / "chat_template.json"):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            return text if path.suffix == ".jinja" else _template_of(text)
    try:
        return _template_of((directory / "tokenizer_config.json").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def read_model_type(directory: Path) -> str:
    """`model_type` of a model directory, of a pruned checkpoint that of what it was pruned from."""
    try:
        name = json.loads((directory / "config.json").read_text()).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(name).removeprefix("depth_pruned_")


def _template_of(text: str) -> str:
    try:
        given: Any = json.loads(text).get("chat_template")
    except (ValueError, AttributeError):
        return ""
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("tool_use") or named.get("default")
    return given if isinstance(given, str) else ""


def _variables(template: str) -> set[str]:
    """Variables a template reads and does not set itself."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        return meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template)))
    except (TemplateError, RecursionError):
        return set()
