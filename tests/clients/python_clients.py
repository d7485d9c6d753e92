"""What the openai package, litellm and LangChain get from the server; prints one line of JSON a check.

usage: python_clients.py openai | litellm | langchain
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

URL, MODEL = os.environ["SHOAL_URL"] + "/v1", os.environ["SHOAL_MODEL"]
KEY, LIMITED = os.environ["SHOAL_KEY"], os.environ["SHOAL_LIMITED_KEY"]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "title": "city", "description": "A city.", "type": "object", "required": ["city"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 20}},
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


class Raised:
    """Expects an error of a class whose message has a text in it."""

    def __init__(self, kind: type[BaseException], text: str = "") -> None:
        self.kind, self.text = kind, text

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, self.kind):
            raise AssertionError(f"expected {self.kind.__name__}, got {error!r}")
        assert self.text in str(error), str(error)
        return True


def checks_openai() -> dict[str, Callable[[], None]]:
    import openai

    def ask(key: str = KEY, **options: Any) -> Any:
        client = openai.OpenAI(base_url=URL, api_key=key, max_retries=0)
        return client.chat.completions.create(
            **{"model": MODEL, "messages": FRANCE, "temperature": 0, "max_tokens": 32} | options
        )

    def embed() -> None:
        openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0).embeddings.create(model=MODEL, input="x")

    errors = (openai.BadRequestError, openai.NotFoundError, openai.AuthenticationError, openai.RateLimitError)
    return _checks(ask, embed, *errors)


def checks_litellm() -> dict[str, Callable[[], None]]:
    import litellm

    litellm.suppress_debug_info = True

    def ask(key: str = KEY, **options: Any) -> Any:
        fixed = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": key, "max_retries": 0, "messages": FRANCE}
        return litellm.completion(**fixed | {"temperature": 0, "max_tokens": 32} | options)

    def embed() -> None:
        litellm.embedding(model=f"openai/{MODEL}", api_base=URL, api_key=KEY, input=["x"], max_retries=0)

    errors = (litellm.BadRequestError, litellm.NotFoundError, litellm.AuthenticationError, litellm.RateLimitError)
    return _checks(ask, embed, *errors)


def _checks(
    ask: Callable[..., Any],
    embed: Callable[[], None],
    bad: type[Exception],
    missing: type[Exception],
    unknown: type[Exception],
    limited: type[Exception],
) -> dict[str, Callable[[], None]]:
    """The checks of clients that answer like OpenAI's own."""

    def text() -> str:
        return ask().choices[0].message.content

    def chat() -> None:
        assert "Paris" in text()

    def streaming() -> None:
        parts = [c.choices[0].delta.content or "" for c in ask(stream=True) if c.choices]
        assert "".join(parts) == text()
        assert len([part for part in parts if part]) > 3

    def tools() -> None:
        with Raised(bad, "tool"):
            ask(tools=[WEATHER])

    def json_schema() -> None:
        answer = ask(response_format=FORMAT, max_tokens=64)
        assert set(json.loads(answer.choices[0].message.content)) == {"city"}

    def embeddings_refused() -> None:
        with Raised(missing):
            embed()

    def bad_request_400() -> None:
        with Raised(bad, "temperature"):
            ask(temperature=-3)

    def wrong_key_401() -> None:
        with Raised(unknown):
            ask("wrong")

    def rate_limit_429() -> None:
        with Raised(limited, "requests per minute"):
            for _ in range(3):
                ask(LIMITED, max_tokens=1)

    return {check.__name__: check for check in (
        chat, streaming, tools, json_schema, embeddings_refused, bad_request_400, wrong_key_401, rate_limit_429,
    )}  # fmt: skip


def checks_langchain() -> dict[str, Callable[[], None]]:
    import openai
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    def model(key: str = KEY, **options: Any) -> ChatOpenAI:
        fixed = {"base_url": URL, "api_key": key, "model": MODEL, "max_retries": 0}
        return ChatOpenAI(**fixed | {"temperature": 0, "max_tokens": 64} | options)

    question = FRANCE[0]["content"]

    def chat() -> None:
        assert "Paris" in model().invoke(question).content

    def streaming() -> None:
        parts = [piece.content for piece in model().stream(question)]
        assert "".join(parts) == model().invoke(question).content
        assert len([part for part in parts if part]) > 3

    def tools() -> None:
        with Raised(openai.BadRequestError, "tool"):
            model().bind_tools([WEATHER]).invoke(question)

    def json_schema() -> None:
        answer = model().with_structured_output(SCHEMA, method="json_schema").invoke(question)
        assert set(answer) == {"city"}

    def embeddings_refused() -> None:
        embeddings = OpenAIEmbeddings(
            base_url=URL, api_key=KEY, model=MODEL, max_retries=0, check_embedding_ctx_length=False
        )
        with Raised(openai.NotFoundError):
            embeddings.embed_query("x")

    def bad_request_400() -> None:
        with Raised(openai.BadRequestError, "temperature"):
            model(temperature=-3).invoke(question)

    def wrong_key_401() -> None:
        with Raised(openai.AuthenticationError):
            model("wrong").invoke(question)

    def rate_limit_429() -> None:
        with Raised(openai.RateLimitError, "requests per minute"):
            for _ in range(3):
                model(LIMITED, max_tokens=1).invoke(question)

    return {check.__name__: check for check in (
        chat, streaming, tools, json_schema, embeddings_refused, bad_request_400, wrong_key_401, rate_limit_429,
    )}  # fmt: skip


def main() -> None:
    for name, check in globals()[f"checks_{sys.argv[1]}"]().items():
        failure = None
        try:
            check()
        except Exception as error:  # noqa: BLE001 - a failure is what this program reports
            failure = f"{type(error).__name__}: {error}"
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
