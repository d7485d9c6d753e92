"""Tokens that the requests inside may come to, prompts and answers, and how many of them may wait for KV cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from starlette.requests import Request
from starlette.responses import JSONResponse

from server.engine.generation import TooManyTokens
from server.errors import Refusal
from server.metrics import QUEUED_TOKENS, REJECTED

UNSAID = 1024  # what an answer without a bound counts: few come to all that the model could write
CACHES = 16  # by default so many times what the KV cache holds may wait


class TokenQueue:
    """Counts the tokens that all requests inside ask for.

    A request asks for its prompt and, for each choice, its longest answer. One that alone is over the limit still gets
    into an empty house.

    Args:
        held: Tokens that the KV cache holds; 0: it has none, so nothing is counted.
        waiting: Tokens that may wait beyond those; None: 16 times what the cache holds.
    """

    def __init__(self, held: int, waiting: int | None) -> None:
        self.held = held
        self.limit = held + (CACHES * held if waiting is None else waiting)
        self.inside = 0

    @contextmanager
    def request(self, *, bounded: bool) -> Iterator[None]:
        """Count what is asked for inside the `with`, until its end.

        Args:
            bounded: Whether the request says how long its answer may be.
        """
        reservation = Reservation(self, bounded)
        previous = CURRENT.set(reservation)
        try:
            yield
        finally:
            CURRENT.reset(previous)
            self.enter(-reservation.granted)

    def full(self, more: int, besides: int) -> bool:
        """Whether there is no room for more; `besides` is what the asking request already has."""
        return self.held > 0 and self.inside > besides and self.inside + more > self.limit

    def enter(self, step: int) -> None:
        """Add or, below 0, take away tokens."""
        self.inside += step
        QUEUED_TOKENS.set(max(0, self.inside - self.held))


class Reservation:
    """What one request has asked for.

    It keeps the most that its generations came to at once until its end: a beam search or a call of tools makes them
    one after another. Once the first has ended it is not refused any more.

    Attributes:
        granted: Tokens, the most at once.
    """

    def __init__(self, queue: TokenQueue, bounded: bool) -> None:
        self.queue, self.bounded = queue, bounded
        self.asked = self.granted = 0
        self.begun = False

    def take(self, prompt: int, answer: int, choices: int) -> Callable[[], None]:
        """Ask for the tokens of a generation; gives what to call at its end.

        Raises:
            Refusal: 429, too many tokens wait.
        """
        tokens = prompt + choices * (answer if self.bounded else min(answer, UNSAID))
        more = max(0, self.asked + tokens - self.granted)
        if not self.begun and self.queue.full(more, self.granted):
            REJECTED.labels("token_queue_full").inc()
            text = (
                f"this request asks for {tokens} tokens, and {self.queue.inside} are running or waiting "
                f"(at most {self.queue.limit}); ask for shorter answers, or try again later"
            )
            raise Refusal(429, "token_queue_full", text)
        self.asked += tokens
        self.granted += more
        self.queue.enter(more)

        def end() -> None:
            self.asked -= tokens
            self.begun = True

        return end


CURRENT: ContextVar[Reservation | None] = ContextVar("reservation", default=None)


def reserve(prompt: int, answer: int, choices: int) -> Callable[[], None] | None:
    """Ask for the tokens of a generation, for the request that is being answered.

    Args:
        prompt: Tokens of the prompt.
        answer: Tokens of the longest answer.
        choices: Answers to it.

    Returns:
        What to call at its end; None where no request is answered or nothing is counted.

    Raises:
        Refusal: 429, too many tokens wait.
    """
    reservation = CURRENT.get()
    return None if reservation is None else reservation.take(prompt, answer, choices)


async def refuse_tokens(request: Request, error: Exception) -> JSONResponse:
    """Handler of a generation that was refused."""
    assert isinstance(error, TooManyTokens)
    return error.refusal.response()
