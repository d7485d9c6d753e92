"""vLLM's entry point: makes `depth_pruned_*` checkpoints known. Imports neither torch nor vLLM's internals early.

It is also the one place of ours that runs within the engine's process, so the deadline of grammars is set here.
"""

import os
from concurrent.futures import Future, InvalidStateError
from threading import Timer
from typing import Any

from pruning.families import FAMILIES

GRAMMAR_SECONDS = "SHOAL_GRAMMAR_SECONDS"


def register() -> None:
    """Register configurations and lazy model classes in this process (idempotent; vLLM calls it in every process)."""
    from vllm import ModelRegistry

    from pruning.models.configuration import register_configs
    from server.engine.cache_groups import install

    register_configs()
    install()
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES.values():
        if family.architecture not in known:
            ModelRegistry.register_model(family.architecture, f"server.engine.models:{family.architecture}")
    if seconds := os.environ.get(GRAMMAR_SECONDS):
        limit_grammars(float(seconds))


def limit_grammars(seconds: float) -> None:
    """Let a grammar that takes longer to compile fail, and with it its request, in this process.

    vLLM 0.32 compiles in threads that nothing can stop and asks each step whether a grammar is done; one that never is
    would keep its request, and all of the same thread, for ever. Compiling goes on when the deadline has passed (it
    releases the interpreter's lock), but a grammar that had not begun is never begun.

    Args:
        seconds: From when the request came; those that wait for a thread count.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    stock = getattr(StructuredOutputManager.grammar_init, "stock", StructuredOutputManager.grammar_init)

    def grammar_init(self: Any, request: Any) -> None:
        stock(self, request)
        asked = request.structured_output_request
        if asked is not None and isinstance(asked._grammar, Future):
            asked.grammar = expiring(asked._grammar, seconds)

    grammar_init.stock = stock  # type: ignore[attr-defined]
    StructuredOutputManager.grammar_init = grammar_init


def expiring(work: Future[Any], seconds: float) -> Future[Any]:
    """What becomes of some work, or a TimeoutError when that takes too long."""
    outcome: Future[Any] = Future()

    def expire() -> None:
        work.cancel()
        _settle(outcome, TimeoutError(f"the grammar took longer than {seconds:g} s to compile"))

    timer = Timer(seconds, expire)
    timer.daemon = True
    timer.start()

    def done(finished: Future[Any]) -> None:
        timer.cancel()
        if not finished.cancelled():
            _settle(outcome, finished.exception() or finished.result())

    work.add_done_callback(done)
    return outcome


def _settle(outcome: Future[Any], value: Any) -> None:
    try:
        if isinstance(value, BaseException):
            outcome.set_exception(value)
        else:
            outcome.set_result(value)
    except InvalidStateError:
        pass  # the other of the two came first
