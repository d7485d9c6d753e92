"""What to measure, checked before torch is loaded."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pruning.console import Reporter
from pruning.errors import EvaluationError, StorageError
from pruning.evaluation.questions import Question, read_letter_questions, read_questions
from pruning.models.checkpoint import is_pruned
from pruning.models.finding import find_model
from pruning.texts.reading import read_text


@dataclass(frozen=True, slots=True)
class LongTasks:
    """What to hide, and where.

    Attributes:
        kinds: Of `pruning.texts.long_context.KINDS`.
        lengths: Tokens of a prompt.
        depths: 0 to 1, for the kinds that have one.
        prompts: Of every kind, length and depth.
        filler: File of the text around; None: prose and code that every Python carries.
    """

    kinds: Sequence[str] = ()
    lengths: Sequence[int] = (1024, 2048, 4096)
    depths: Sequence[float] = (0.1, 0.5, 0.9)
    prompts: int = 8
    filler: Path | None = None

    def check(self) -> None:
        """Refuse what no model can be asked.

        Raises:
            EvaluationError: An unknown kind, a depth outside 0 to 1, or nothing to do.
        """
        if self.kinds:
            from pruning.texts.long_context import KINDS

        for kind in self.kinds:
            if kind not in KINDS:
                raise EvaluationError(f"unknown long-context task {kind!r}; there are {', '.join(KINDS)}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise EvaluationError(f"--depths are from 0 (start) to 1 (end), not {depth:g}")
        if self.prompts < 1 or not self.lengths or not self.depths or min(self.lengths) < 2:
            raise EvaluationError(
                "long-context tasks need --depths, --prompts of at least 1 and --lengths of at least 2"
            )

    def cells(self) -> Iterator[tuple[str, int, float]]:
        """Kind, length and depth of every set of prompts; the kinds that spread have one depth, 0."""
        from pruning.texts.long_context import PLACED

        for kind, length in itertools.product(self.kinds, sorted(self.lengths)):
            for depth in sorted(self.depths) if kind in PLACED else (0.0,):
                yield kind, length, depth


NOTHING_HIDDEN = LongTasks()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure.

    Attributes:
        text: Text files.
        text_tokens: Of each, from the start.
        window: T.
        long_context: Window lengths to measure the first text at, all on the same tokens.
        choice: Multiple-choice files.
        letter: A file of MMLU rows for the few-shot letter form, and the file its examples come from.
        shots: Examples in it.
        limit: Questions of each file, evenly spread.
        generate: Prompts of the greedy check against the dense model.
        new_tokens: Tokens it writes.
        recall: Key-value recall prompts.
        seed: Of the bootstrap and the recall prompts.
        tasks: Of lm-evaluation-harness.
        include: Directory of task files.
        url: Server to run the tasks against.
        long_tasks: What to hide in long prompts.
    """

    text: Sequence[Path] = ()
    text_tokens: int = 20480
    window: int = 512
    long_context: Sequence[int] = ()
    choice: Sequence[Path] = ()
    letter: tuple[Path, Path] | None = None
    shots: int = 5
    limit: int | None = None
    generate: int = 0
    new_tokens: int = 64
    recall: int = 0
    seed: int = 0
    tasks: Sequence[str] = ()
    include: Path | None = None
    url: str | None = None
    long_tasks: LongTasks = NOTHING_HIDDEN

    @property
    def of_model(self) -> bool:
        """Whether a model has to be loaded for anything but the harness's tasks."""
        return bool(self.text or self.choice or self.letter or self.recall or self.long_tasks.kinds)


def questions_of(wanted: Wanted) -> list[list[Question]]:
    """All question sets, read before anything costs time."""
    sets = [read_questions(path, wanted.limit) for path in wanted.choice]
    if wanted.letter is not None:
        sets.append(read_letter_questions(*wanted.letter, shots=wanted.shots, limit=wanted.limit))
    return sets


def check(name: str, against: str | None, wanted: Wanted, output: Path | None, reporter: Reporter) -> None:
    """Refuse what cannot be measured.

    Args:
        name: What to measure.
        against: What to compare it with.
        wanted: What to measure of it.
        output: File for the result.
        reporter: For progress.

    Raises:
        UserError: Anything about the request.
    """
    if not (wanted.of_model or wanted.tasks):
        raise EvaluationError(
            "nothing to measure; give --text, --choice, --letter, --recall, --long-context-tasks or --tasks"
        )
    if min(wanted.window, *wanted.long_context, wanted.text_tokens) < 2:
        raise EvaluationError("windows and --text-tokens are at least 2 tokens")
    if output is not None and not output.resolve().parent.is_dir():
        raise StorageError(f"cannot write {output}: no such directory")
    questions_of(wanted)
    for path in (*wanted.text, *([wanted.long_tasks.filler] if wanted.long_tasks.filler else [])):
        read_text(path)
    wanted.long_tasks.check()
    if wanted.of_model or wanted.url is None:
        for model in (name, against):
            if model is not None and not is_pruned(Path(model)):
                find_model(model, reporter, weights_stay=True)
