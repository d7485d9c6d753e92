"""Every generation on the engine, whatever route asks for it: its limits, its count, and what it fails for."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from server.errors import Refusal


class TooManyTokens(GracefulHTTPError):
    """A generation is refused because too many tokens wait.

    Attributes:
        refusal: What the client is told.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text, HTTPStatus(refusal.status))
        self.refusal = refusal


def guard_generation(
    engine: Any,
    max_prompt_tokens: int | None,
    max_output_tokens: int | None,
    spending: Callable[[], Callable[[int], None] | None],
    reserve: Callable[[int, int, int], Callable[[], None] | None],
) -> None:
    """Limit the tokens of every generation on this engine client, whatever route asks for it, and count them.

    vLLM's handlers call `engine.generate` before they answer, so a refusal becomes an ordinary 400 or 429.

    Args:
        engine: vLLM's engine client.
        max_prompt_tokens: Of one prompt; None: no limit but the model's.
        max_output_tokens: Of one answer, which is cut there; None: no limit but the model's.
        spending: Called once a generation; gives what to call with each number of tokens, or None.
        reserve: Called once a generation with the tokens of its prompt, those of its longest answer, and its choices;
            gives what to call at its end, or None. Its `Refusal` becomes the answer.
    """
    stock, longest = engine.generate, engine.model_config.max_model_len

    def generate(prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        length = len(prompt.get("prompt_token_ids") or prompt.get("prompt_embeds") or ()) if prompt else 0
        if max_prompt_tokens is not None and length > max_prompt_tokens:
            raise VLLMValidationError(
                f"the prompt has {length} tokens; this server takes at most {max_prompt_tokens}", parameter="prompt"
            )
        if max_output_tokens is not None and (sampling_params.max_tokens or max_output_tokens + 1) > max_output_tokens:
            sampling_params = sampling_params.clone()
            sampling_params.max_tokens = max_output_tokens
            sampling_params.min_tokens = min(sampling_params.min_tokens, max_output_tokens)
        try:
            release = reserve(length, sampling_params.max_tokens or longest - length, sampling_params.n)
        except Refusal as refusal:
            raise TooManyTokens(refusal) from refusal
        answer = stock(prompt, sampling_params, request_id, **options)
        if release is not None:
            answer = _reserved(answer, release)
        if sampling_params.structured_outputs is not None:
            answer = _blaming_the_grammar(answer)
        spend = spending()
        if spend is None:
            return answer
        spend(length)
        return _counted(answer, spend)

    engine.generate = generate


async def _blaming_the_grammar(answer: Any) -> AsyncIterator[Any]:
    """An answer that fails before its first token fails for its grammar: vLLM itself calls that an internal error."""
    begun = False
    async with aclosing(answer):
        async for output in answer:
            if not begun and any(part.finish_reason == "error" for part in output.outputs):
                raise VLLMValidationError(
                    "the schema or grammar cannot be compiled, or not in the time this server gives it",
                    parameter="response_format",
                )
            begun = begun or any(part.token_ids for part in output.outputs)
            yield output


async def _reserved(answer: Any, release: Callable[[], None]) -> AsyncIterator[Any]:
    try:
        async with aclosing(answer):
            async for output in answer:
                yield output
    finally:
        release()


async def _counted(answer: Any, spend: Callable[[int], None]) -> AsyncIterator[Any]:
    async with aclosing(answer):
        async for output in answer:  # the server asks for deltas or for one final output, never for running totals
            spend(sum(len(part.token_ids) for part in output.outputs))
            yield output


def raised_while_reading(error: BaseException) -> bool:
    """Whether an exception comes from where vLLM turns messages into a prompt, which only a request can make fail."""
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).startswith("vllm.renderers."):
            return True
        trace = trace.tb_next
    return False
