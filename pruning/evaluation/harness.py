"""Any task of lm-evaluation-harness, on a model in memory or on a running server. Needs the extra `eval`."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.errors import EvaluationError


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise EvaluationError("--tasks needs lm-evaluation-harness; install shoal[eval]") from error
    return lm_eval


def _tasks(names: Sequence[str], include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise EvaluationError(f"lm-evaluation-harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    return manager


def _run(model: Any, names: Sequence[str], include: Path | None, limit: int | None, **arguments: Any) -> dict[str, Any]:
    harness, manager = _harness(), _tasks(names, include)
    try:
        found = harness.simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0,
            **arguments,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(f"the data of {', '.join(names)} or the server cannot be reached: {reason}") from error
    return {name: values for name, values in found["results"].items() if name in found["n-samples"] or name in names}


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], include: Path | None = None,
    limit: int | None = None, batch_size: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Task -> metric -> value, as lm-evaluation-harness computes them.

    Args:
        model: Dense or pruned.
        tokenizer: Of the model.
        names: Tasks or groups.
        include: Directory with task files of your own.
        limit: Only so many documents of each task.
        batch_size: Of its forwards.

    Raises:
        EvaluationError: The harness is not installed, a task is unknown, or its data cannot be had.
    """
    _harness()
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    return _run(wrapped, names, include, limit)


def served_models(url: str) -> list[str]:
    """Names that an OpenAI-compatible server serves.

    Raises:
        EvaluationError: It does not answer, or not as such a server does.
    """
    address = f"{url.rstrip('/')}/v1/models"
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            return [str(one["id"]) for one in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"no model server answers at {address}: {' '.join(str(error).split())[:200]}") from error


def run_tasks_on_server(
    url: str, model: str, tokenizer: str, names: Sequence[str], include: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The same against a running OpenAI-compatible server, by its `/v1/completions`.

    Args:
        url: Of the server, without a path.
        model: Name it serves.
        tokenizer: Directory or id of the model's tokenizer.
        names: Tasks or groups.
        include: Directory with task files of your own.
        limit: Only so many documents of each task.

    Raises:
        EvaluationError: As for `run_tasks`; also where the server does not answer, or serves something else.
    """
    if model not in (served := served_models(url)):
        raise EvaluationError(f"{url} serves {', '.join(served)}, not {model}; name the directory that it serves")
    arguments = {
        "model": model, "base_url": f"{url.rstrip('/')}/v1/completions", "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface", "num_concurrent": 4, "tokenized_requests": True,
    }  # fmt: skip
    return _run("local-completions", names, include, limit, model_args=arguments)
