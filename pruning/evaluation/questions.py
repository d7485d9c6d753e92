"""Question files and `--task`, read and checked before anything costs time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.errors import CalibrationError, EvaluationError, RecipeError
from pruning.texts.reading import lone_surrogate
from pruning.texts.rows import format_of, located, read_rows


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        task: Name of the set.
        id: Within the set.
        context: What precedes the answer.
        choices: Continuations of the context, with their leading space.
        label: Index of the right one.
    """

    task: str
    id: str
    context: str
    choices: tuple[str, ...]
    label: int


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSONL or Parquet file, with their places for messages."""
    try:
        for place, row in read_rows(located(path)):
            if not isinstance(row, dict):
                raise EvaluationError(f"{place}: expected a JSON object")
            json.dumps(row, ensure_ascii=False, default=str).encode()
            yield place, row
    except UnicodeEncodeError as error:
        raise EvaluationError(f"{place}: {lone_surrogate(error)}") from error
    except CalibrationError as error:
        raise EvaluationError(str(error)) from error


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read JSON lines `{"task", "id", "context", "choices", "label"}`.

    Args:
        path: File.
        limit: Only so many questions, spread evenly over the file.

    Raises:
        EvaluationError: Unreadable, a field is missing or wrong, or no question.
    """
    questions = []
    for number, (place, row) in enumerate(_rows(path), 1):
        choices, label = row.get("choices"), row.get("label")
        good = isinstance(row.get("context"), str) and isinstance(choices, list) and isinstance(label, int)
        if not good or not all(isinstance(c, str) and c for c in choices or []) or not 0 <= (label or 0) < len(choices):  # type: ignore[arg-type]
            raise EvaluationError(f"{place}: expected a context, choices that are texts, and the label of one")
        name = str(row.get("task", path.stem))
        questions.append(Question(name, str(row.get("id", number)), row["context"], tuple(choices), label))  # type: ignore[arg-type]
    if not questions:
        raise EvaluationError(f"{path} holds no question")
    return spread(questions, limit)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, evenly spread, so that sets sorted by subject stay balanced."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // limit] for i in range(limit)]


def read_letter_questions(path: Path, shots_path: Path, shots: int = 5, limit: int | None = None) -> list[Question]:
    """Read MMLU rows (`subject`, `question`, `choices`, `label`) as its few-shot letter form.

    The prompt lists the lettered choices and the answer is one letter; the subject's first `shots` rows of
    `shots_path` come before it, answered.

    Raises:
        EvaluationError: A row lacks a field, or a subject has too few rows for the shots.

    Source: Hendrycks et al., arXiv 2009.03300, and its evaluation code's prompt.
    """
    rows, examples = [row for _, row in _rows(path)], [row for _, row in _rows(shots_path)]
    for row in (*rows, *examples):
        if not {"subject", "question", "choices", "label"} <= row.keys():
            raise EvaluationError(f"{path}: the letter form needs subject, question, choices and label in every row")
    by_subject: dict[str, list[str]] = {}
    for row in examples:
        by_subject.setdefault(row["subject"], []).append(f"{_lettered(row)} {'ABCDEFGHIJ'[row['label']]}\n\n")
    questions = []
    for number, row in enumerate(rows):
        known = by_subject.get(row["subject"], [])
        if len(known) < shots:
            raise EvaluationError(f"{shots_path} holds {len(known)} rows of {row['subject']}, fewer than {shots} shots")
        head = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
        context = f"{head}\n\n{''.join(known[:shots])}{_lettered(row)}"
        letters = tuple(f" {letter}" for letter in "ABCDEFGHIJ"[: len(row["choices"])])
        questions.append(Question(f"mmlu_{shots}shot", str(row.get("id", number)), context, letters, row["label"]))
    return spread(questions, limit)


def _lettered(row: Mapping[str, Any]) -> str:
    listed = "\n".join(f"{'ABCDEFGHIJ'[i]}. {choice.strip()}" for i, choice in enumerate(row["choices"]))
    return f"{row['question'].strip()}\n{listed}\nAnswer:"


def parse_task(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:weight`.

    Raises:
        RecipeError: The weight is not positive.
    """
    name, colon, weight = text.rpartition(":")
    try:
        if colon and float(weight) > 0:
            return Path(name), float(weight)
        if colon and not Path(text).exists():
            raise RecipeError(f"--task {text}: the weight must be over 0")
    except ValueError:
        pass
    return Path(text), 1.0


def holds_questions(path: Path) -> bool:
    """Whether a file is JSON lines with choices, not text."""
    if format_of(path) not in (".jsonl", ".parquet") or not path.is_file():
        return False
    try:
        first = next(read_rows(path), ("", None))[1]
    except CalibrationError:
        return False  # whoever reads it as text says why
    return isinstance(first, dict) and "choices" in first
