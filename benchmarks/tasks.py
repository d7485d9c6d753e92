"""Work over long contexts whose answers can be judged: sums, small functions, a fact of a long chat, the next line.

Each item says early what is asked for late. Other text stands between, as many tokens as one wants: what a window
drops is then needed. All is made here from seeds, the text of this package and Python's own library.
"""

import ast
import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sandbox import passes

from pruning.texts.shipped import documents
from pruning.texts.words import NAMES, THINGS

Messages = list[dict[str, str]]
Count = Callable[[str], int]
"""Tokens of a text."""

TURN_TOKENS = 300  # of one answer in a long chat
LEAST_CHARACTERS = 12  # of a line that is worth completing
MODULES = ("textwrap", "heapq", "fnmatch", "shlex", "statistics", "calendar", "csv", "configparser", "difflib",
           "gettext", "fractions", "string", "cmd", "ast", "zipapp", "tokenize")  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One task.

    Attributes:
        name: Within its kind.
        prompt: A chat that ends with the user's turn, or plain text to continue.
        new_tokens: To write, at most.
        judge: What was written -> 0 to 1.
        stop: Where a continuation ends; empty: at the end of the model's turn.
    """

    name: str
    prompt: Messages | str
    new_tokens: int
    judge: Callable[[str], float]
    stop: str = ""


def other_text(count: Count, tokens: int, chance: random.Random) -> str:
    """About so many tokens of a document of this package, whole lines."""
    if not tokens:
        return ""
    texts = [document.text for document in documents() if document.use == "held out"]
    lines = chance.choice(texts).splitlines()
    first, out, used = chance.randrange(max(1, len(lines) // 2)), [], 0
    for line in lines[first:] + lines:
        if used >= tokens:
            break
        out.append(line)
        used += count(line + "\n")
    return "\n".join(out)


def _between(early: str, text: str, late: str) -> Messages:
    middle = (
        f"\n\nBefore the question, here is a text that has nothing to do with it:\n\n{text}\n\n" if text else "\n\n"
    )
    return [{"role": "user", "content": f"{early}{middle}{late}"}]


def last_number(text: str) -> int | None:
    """The last whole number of an answer; thousands may have commas."""
    found = re.findall(r"-?\d[\d,]*", text)
    return int(found[-1].replace(",", "")) if found else None


def _sum(chance: random.Random) -> tuple[str, str, int]:
    """Facts, question and answer of one problem of two to four steps."""
    name, other = chance.sample(NAMES, 2)
    thing = chance.choice(THINGS)
    a, b, c, d = (chance.randint(*bounds) for bounds in ((12, 60), (3, 9), (2, 8), (10, 90)))
    forms = [
        (f"{name} has {b} boxes with {a} pieces of {thing} in each. {other} takes {d % (a * b)} pieces away.",
         f"How many pieces of {thing} does {name} have then?", a * b - d % (a * b)),
        (f"A shop sells {thing} at {b} coins a piece. {name} buys {a} pieces, {other} buys {c} times as many.",
         "How many coins do both pay together?", a * b + a * b * c),
        (f"{name} reads {a} pages a day for {b} days, then {c} pages more a day than before for {c} days.",
         f"How many pages does {name} read in all?", a * b + (a + c) * c),
        (f"{name} earns {d} coins a week and spends {b} of them. {other} earns twice as much and spends {a} less than "
         f"{name} earns.", "How many coins do both have left after one week, together?", d - b + 2 * d - (d - a)),
        (f"A train with {a + d} people stops {b} times. At every stop {c} people get in and nobody gets out.",
         "How many people are in the train at the end?", a + d + b * c),
    ]  # fmt: skip
    return chance.choice(forms)


def sums(count: Count, between: int, seed: int) -> Iterator[Item]:
    """Word problems with exact answers, after the form of GSM8K (arXiv 2110.14168); none is taken from it."""
    for number in range(10**6):
        chance = random.Random(f"sum {seed} {number}")
        facts, question, answer = _sum(chance)
        late = f"{question} Work it out step by step, and end with the number alone."
        messages = _between(
            facts, other_text(count, between, chance), f"The question about what was said first: {late}"
        )
        yield Item(str(number), messages, 160, lambda text, answer=answer: float(last_number(text) == answer))


FUNCTIONS: Sequence[tuple[str, str, Sequence[tuple[Sequence[Any], Any]]]] = (
    (
        "largest_gap(numbers)",
        "Return the largest difference between neighbours of the sorted list, 0 if there are fewer than two numbers.",
        [([[1, 9, 4]], 5), ([[5]], 0), ([[]], 0), ([[3, 3, 3]], 0), ([[-5, 10, 0]], 10)],
    ),
    (
        "is_palindrome(text)",
        "Return whether the text reads the same backwards; case and anything but letters and digits do not count.",
        [(["A man, a plan, a canal: Panama"], True), (["ab"], False), ([""], True), (["No 'x' in Nixon"], True)],
    ),
    (
        "run_lengths(text)",
        "Return a list of [character, count] for every run of equal characters.",
        [
            (["aab"], [["a", 2], ["b", 1]]),
            ([""], []),
            (["zzz"], [["z", 3]]),
            (["abab"], [["a", 1], ["b", 1], ["a", 1], ["b", 1]]),
        ],
    ),
    (
        "digit_sum(number)",
        "Return the sum of the decimal digits of a whole number; its sign does not count.",
        [([123], 6), ([-45], 9), ([0], 0), ([9999], 36)],
    ),
    (
        "common(a, b)",
        "Return the sorted list of the values that are in both lists, each once.",
        [([[3, 1, 2], [2, 3, 5]], [2, 3]), ([[1, 1], [1, 1]], [1]), ([[], [1]], [])],
    ),
    (
        "second_largest(numbers)",
        "Return the second largest of the different values, or None if there is none.",
        [([[1, 2, 3]], 2), ([[5, 5]], None), ([[]], None), ([[7, 7, 3]], 3)],
    ),
    (
        "flatten(items)",
        "Return a flat list of all values of a list that holds lists to any depth.",
        [([[1, [2, [3, []]]]], [1, 2, 3]), ([[]], []), ([[[["a"]]]], ["a"])],
    ),
    (
        "is_balanced(text)",
        "Return whether all round, square and curly brackets of the text are closed in the right order; "
        "other characters do not count.",
        [(["(a[b]{c})"], True), (["(]"], False), (["(("], False), ([""], True), ([")("], False)],
    ),
    (
        "to_roman(number)",
        "Return a whole number from 1 to 3999 as a Roman numeral.",
        [([1], "I"), ([4], "IV"), ([1994], "MCMXCIV"), ([3999], "MMMCMXCIX"), ([40], "XL")],
    ),
    (
        "chunks(items, size)",
        "Return the list cut into lists of `size` values, the last of which may be shorter.",
        [([[1, 2, 3], 2], [[1, 2], [3]]), ([[], 3], []), ([[1], 5], [[1]]), ([[1, 2, 3, 4], 2], [[1, 2], [3, 4]])],
    ),
    (
        "caesar(text, shift)",
        "Return the text with every letter of a to z and A to Z moved `shift` places along the alphabet, "
        "round its end; other characters stay.",
        [(["xyz", 3], "abc"), (["Abc!", 1], "Bcd!"), (["b", -1], "a"), (["", 5], "")],
    ),
    (
        "prime_factors(number)",
        "Return the sorted list of the prime factors of a whole number over 1, each as often as it divides.",
        [([12], [2, 2, 3]), ([13], [13]), ([8633], [89, 97]), ([2], [2])],
    ),
    (
        "transpose(rows)",
        "Return the matrix, a list of rows of one length, with rows and columns exchanged.",
        [([[[1, 2], [3, 4]]], [[1, 3], [2, 4]]), ([[[1, 2, 3]]], [[1], [2], [3]]), ([[]], [])],
    ),
    (
        "moving_average(numbers, size)",
        "Return the list of the means of every `size` values in a row.",
        [([[1, 2, 3, 4], 2], [1.5, 2.5, 3.5]), ([[1], 2], []), ([[2, 4, 6], 3], [4.0])],
    ),
    (
        "first_unique(text)",
        "Return the first character that is in the text once, or None.",
        [(["aabc"], "b"), (["aa"], None), ([""], None), (["abcab"], "c")],
    ),
    (
        "group_by_length(words)",
        "Return a dictionary from length to the list of the words that are so long, in order. Return its "
        "items as a list of [length, words], sorted by length.",
        [([["a", "bb", "c"]], [[1, ["a", "c"]], [2, ["bb"]]]), ([[]], [])],
    ),
)
"""Signature, what it does, tests."""


def written_code(text: str) -> str:
    """The code of an answer: its first fenced block, or all of it."""
    found = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found[1] if found else text


def functions(count: Count, between: int, seed: int) -> Iterator[Item]:
    """Small functions by their description, judged by tests that the model does not see: pass@1, greedy."""
    for signature, does, tests in FUNCTIONS:
        chance, name = random.Random(f"function {seed} {signature}"), signature.partition("(")[0]
        late = f"Write the Python function `{name}` as it is described above. Answer with its code alone."
        early = f"The function `{signature}`: {does}"
        messages = _between(early, other_text(count, between, chance), late)

        def judge(text: str, name: str = name, tests: Sequence[Any] = tests) -> float:
            return float(passes(written_code(text), name, tests))

        yield Item(name, messages, 256, judge)


def chats(count: Count, between: int, seed: int) -> Iterator[Item]:
    """A chat of several turns about other things, after which a fact of the first turn is asked for."""
    for number in range(10**6):
        chance = random.Random(f"chat {seed} {number}")
        place, code = chance.choice(THINGS), str(chance.randint(10000, 99999))
        messages = [
            {
                "role": "user",
                "content": f"My locker is the one beside the {place}, and its code is {code}. Keep it in mind.",
            },
            {"role": "assistant", "content": f"I will: the locker beside the {place} has the code {code}."},
        ]
        used = 0
        while used < between:
            part = other_text(count, min(TURN_TOKENS, between - used), chance)
            asked = f"Read me some more of what you were reading, part {len(messages) // 2}."
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": part}]
            used += count(asked + part)
        messages.append({"role": "user", "content": f"What is the code of my locker beside the {place}?"})
        yield Item(str(number), messages, 32, lambda text, code=code: float(code in text.replace(" ", "")))


def completions(count: Count, between: int, seed: int) -> Iterator[Item]:
    """The next line of a file of Python's own library, after `between` tokens (256 at least) of its first lines."""
    for name in MODULES:
        source = inspect.getsource(import_module(name))
        lines, prose = source.splitlines(keepends=True), _text_lines(source)
        used, wanted = 0, max(256, between)
        for number, line in enumerate(lines):
            code = number + 1 not in prose and not line.lstrip().startswith("#")
            if used >= wanted and code and len(line.strip()) >= LEAST_CHARACTERS:
                due = line.strip()
                yield Item(name, "".join(lines[:number]), 48, lambda text, due=due: alike(text, due), stop="\n")
                break
            used += count(line)


def _text_lines(source: str) -> set[int]:
    """Numbers of the lines, from 1, that are texts alone, as docstrings are."""
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    found = [each for each in texts if isinstance(each.value, ast.Constant)]
    return {line for each in found for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}


def alike(text: str, due: str) -> float:
    """1 where the first line that is not empty is the due one, else 0."""
    return float(first_line(text) == due)


def first_line(text: str) -> str:
    """The first line with something in it, without spaces around."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


KINDS: dict[str, Callable[[Count, int, int], Iterator[Item]]] = {
    "sums": sums, "functions": functions, "chat": chats, "completion": completions,
}  # fmt: skip
