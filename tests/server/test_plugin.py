"""The deadline of grammars, on vLLM's own manager of them."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from server.plugin import expiring, limit_grammars


@pytest.fixture
def manager(monkeypatch):
    """A manager with one thread; `_create_grammar` does what the request says."""
    monkeypatch.setattr(StructuredOutputManager, "grammar_init", StructuredOutputManager.grammar_init)
    monkeypatch.setattr(StructuredOutputManager, "_create_grammar", lambda self, request: request.compile())
    made = StructuredOutputManager.__new__(StructuredOutputManager)
    made.backend, made._use_async_grammar_compilation = object(), True
    with ThreadPoolExecutor(1) as made.executor:
        yield made


def ask(manager, work) -> StructuredOutputRequest:
    asked = StructuredOutputRequest(params=None)
    manager.grammar_init(SimpleNamespace(structured_output_request=asked, sampling_params=None, compile=work))
    return asked


def wait(asked: StructuredOutputRequest):
    deadline = time.monotonic() + 5
    while not asked.is_grammar_ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return asked.grammar


def test_a_grammar_that_takes_too_long_fails_and_so_does_one_that_waits_for_it(manager):
    limit_grammars(60)
    limit_grammars(0.2)  # the last call counts, once
    release, begun = threading.Event(), []
    slow = ask(manager, lambda: release.wait(20))
    behind = ask(manager, lambda: begun.append(1))
    assert not slow.is_grammar_ready
    for asked in (slow, behind):
        assert "longer than 0.2 s" in str(wait(asked))
    release.set()
    assert wait(ask(manager, lambda: "grammar")) == "grammar"
    assert begun == []


def test_a_grammar_in_time_is_what_it_was(manager):
    limit_grammars(5)
    assert wait(ask(manager, lambda: "grammar")) == "grammar"
    assert isinstance(wait(ask(manager, lambda: 1 / 0)), ZeroDivisionError)


def test_only_the_first_outcome_counts():
    work: Future = Future()
    outcome = expiring(work, 0.05)
    assert isinstance(outcome.exception(2), TimeoutError)
    assert work.cancelled()
