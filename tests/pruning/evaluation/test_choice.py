"""Batched, cached log-likelihoods are those of one plain forward for every choice; bad files end in one line."""

import json

import pytest
import torch

from pruning.errors import EvaluationError
from pruning.evaluation.choice import accuracy, answer, encode, loglikelihoods
from pruning.evaluation.questions import Question, read_letter_questions, read_questions
from tests.conftest import pico_tokenizer

SHOTS = "Question: which of the fish swims in a school? Answer: a shoal of herring does, and many others. " * 2
QUESTIONS = [
    Question("t", "0", "One two", (" three", " four five six", "!"), 1),
    Question("t", "1", SHOTS + "First", (" a", " bc"), 0),
    Question("t", "2", "The end of a longer context is near", (" x",), 0),
    Question("t", "3", SHOTS + "Second one", (" abc", " b", " c d"), 2),
    Question("t", "4", SHOTS, (" abc", " b"), 0),
    Question("t", "5", "ends in spaces  ", ("q", "rs"), 0),
    Question("t", "6", "", ("alone", " or not"), 1),
    Question("t", "7", SHOTS + "letters", tuple("ABCD"), 3),
]


def plain(model, tokenizer, question):
    """One whole forward for every choice, no cache, no padding."""
    context, choices = encode(tokenizer, question)
    values = []
    for choice in choices:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([context + choice])).logits[0].double().log_softmax(-1)
        rows = torch.arange(len(context) - 1, len(context) + len(choice) - 1)
        values.append(float(logits[rows, choice].sum()))
    return values


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_equals_plain_forwards(family, pico):
    model, tokenizer = pico(family, max_position_embeddings=512), pico_tokenizer()
    found = loglikelihoods(model, tokenizer, QUESTIONS)
    for question, values in zip(QUESTIONS, found, strict=True):
        assert values == pytest.approx(plain(model, tokenizer, question), abs=2e-4), question.id


def test_equals_plain_forwards_of_a_pruned_model(pico_checkpoint):
    model, tokenizer = pico_checkpoint("llama")[1], pico_tokenizer()
    short = [question for question in QUESTIONS if len(question.context) < 240]
    for question, values in zip(short, loglikelihoods(model, tokenizer, short), strict=True):
        assert values == pytest.approx(plain(model, tokenizer, question), abs=2e-4), question.id


def test_accuracy_counts_what_was_answered(pico):
    answers = answer(pico("llama", max_position_embeddings=512), pico_tokenizer(), QUESTIONS)
    right = [
        max(range(len(q.choices)), key=lambda i, a=a: a.loglikelihoods[i]) == q.label
        for q, a in zip(QUESTIONS, answers, strict=True)
    ]
    result = accuracy(answers)
    assert result["acc"] == sum(right) / len(QUESTIONS)
    p = result["acc"]
    assert result["acc_stderr"] == pytest.approx((p * (1 - p) / (len(QUESTIONS) - 1)) ** 0.5)


def test_context_longer_than_the_model_keeps_its_end(pico):
    model, tokenizer = pico("llama", max_position_embeddings=64), pico_tokenizer()
    long = Question("t", "long", "z" * 100 + "the end that counts", (" yes", " no"), 0)
    cut = Question("t", "cut", long.context[-61:], long.choices, 0)
    assert loglikelihoods(model, tokenizer, [long]) == loglikelihoods(model, tokenizer, [cut])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "questions.jsonl:2: not JSON"),
        ('{"context": "a", "choices": ["b"], "label": 1}', "questions.jsonl:2: expected a context, choices"),
        ('{"context": "a", "choices": "bc", "label": 0}', "questions.jsonl:2: expected a context, choices"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "questions.jsonl:2: expected a context, choices"),
        ('{"context": "a", "choices": ["b"], "label": -1}', "questions.jsonl:2: expected a context, choices"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"task": "t", "id": "0", "context": "a", "choices": ["b"], "label": 0}\n' + line + "\n")
    with pytest.raises(EvaluationError, match=message):
        read_questions(path)


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "a\u2028b", "choices": ["c"], "label": 0}\n')
    assert read_questions(path)[0].context == "a\u2028b"


def test_letter_form_shows_answered_examples_first(tmp_path):
    rows = [{"subject": "fish_lore", "question": f"Q{i}?", "choices": [" w", " x", " y", " z"], "label": i % 4}
            for i in range(4)]  # fmt: skip
    dev, val = tmp_path / "dev.jsonl", tmp_path / "val.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    val.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    first, _ = read_letter_questions(val, dev, shots=2)
    assert first.context == (
        "The following are multiple choice questions (with answers) about fish lore.\n\n"
        "Q0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\nQ1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "Q2?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert (first.choices, first.label) == ((" A", " B", " C", " D"), 2)
    with pytest.raises(EvaluationError, match="holds 2 rows of fish_lore, fewer than 5"):
        read_letter_questions(val, dev)
