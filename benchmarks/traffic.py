"""Mixed requests to an OpenAI endpoint, and what became of each: for `soak.py`.

Every kind knows which answer is right. An answer is `ok`, or one word says what else it was:
    refused   503 (drain, start, full queue) or no connection: nothing was begun
    told      the server said that it failed: an error object, or an error as the last event of a stream
    broken    the connection ended in the middle
    silent    it looked whole but was not: the one thing a client cannot notice
    wrong     another status or body than the kind asks for
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

WORDS = [
    "river",
    "stone",
    "light",
    "under",
    "seven",
    "open",
    "field",
    "the",
    "of",
    "a",
    "to",
    "morning",
    "letter",
    "green",
]
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["city", "size"],
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "size": {"enum": [1, 2, 3]}},
}  # fmt: skip
# vLLM holds arguments to their schema where the tool asks for it.
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
# What is wrong -> (method, path, body or bytes, status that is right)
WRONG: dict[str, tuple[str, str, Any, int]] = {
    "no such model": ("POST", "/v1/completions", {"model": "nobody", "prompt": "x"}, 404),
    "no JSON": ("POST", "/v1/completions", b'{"model": ', 400),
    "too many choices": ("POST", "/v1/completions", {"prompt": "x", "n": 10_000}, 400),
    "longer than the model": ("POST", "/v1/completions", {"prompt": "x y " * 40_000}, 400),
    "temperature in words": ("POST", "/v1/completions", {"prompt": "x", "temperature": "hot"}, 400),
    "a schema that is none": ("POST", "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}}, 400),
    "no such path": ("POST", "/v1/nothing", {"prompt": "x"}, 404),
    "wrong method": ("DELETE", "/v1/completions", b"", 405),
}  # fmt: skip


@dataclass(frozen=True)
class End:
    """How a request ended; `status` is 0 where none came."""

    word: str
    status: int = 0
    detail: str = ""


class Client:
    """Asks for one thing after another.

    Args:
        url: Of the server.
        model: Its name.
        chance: Draws prompts and lengths.
        long: Tokens, about, of a long prompt.
    """

    def __init__(self, url: str, model: str, chance: random.Random, long: int) -> None:
        self.url, self.model, self.chance, self.long = url, model, chance, long

    def prompt(self, words: int) -> str:
        return " ".join(self.chance.choices(WORDS, k=words))

    async def post(self, http: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with http.post(self.url + path, json={"model": self.model} | body) as answer:
            return answer.status, await answer.json()

    async def chat(self, http: aiohttp.ClientSession) -> End:
        tokens = self.chance.randint(8, 48)
        messages = [{"role": "user", "content": self.prompt(20)}]
        body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True}
        status, answer = await self.post(http, "/v1/chat/completions", body)
        if status != 200:
            return _refusal(status, answer)
        whole = answer["usage"]["completion_tokens"] == tokens and answer["choices"][0]["finish_reason"] == "length"
        return End("ok" if whole else "silent", status)

    async def choices(self, http: aiohttp.ClientSession) -> End:
        body = {"prompt": [self.prompt(10), self.prompt(30)], "n": 3, "max_tokens": 8}
        status, answer = await self.post(http, "/v1/completions", body)
        if status != 200:
            return _refusal(status, answer)
        return End("ok" if len(answer["choices"]) == 6 else "silent", status)

    async def long_prompt(self, http: aiohttp.ClientSession) -> End:
        body = {"prompt": self.prompt(self.long), "max_tokens": 8, "ignore_eos": True}
        status, answer = await self.post(http, "/v1/completions", body)
        if status != 200:
            return _refusal(status, answer)
        return End("ok" if answer["usage"]["completion_tokens"] == 8 else "silent", status)

    async def grammar(self, http: aiohttp.ClientSession) -> End:
        messages = [{"role": "user", "content": f"A city? {self.prompt(5)}"}]
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        body = {"messages": messages, "max_tokens": 64, "response_format": form}
        status, answer = await self.post(http, "/v1/chat/completions", body)
        if status != 200:
            return _refusal(status, answer)
        return _of_schema(status, answer["choices"][0], answer["choices"][0]["message"]["content"])

    async def tool(self, http: aiohttp.ClientSession) -> End:
        messages = [{"role": "user", "content": f"Weather in Oslo? {self.prompt(5)}"}]
        named = {"type": "function", "function": {"name": "weather"}}
        body = {"messages": messages, "max_tokens": 64, "tools": [TOOL], "tool_choice": named}
        status, answer = await self.post(http, "/v1/chat/completions", body)
        if status != 200:
            return _refusal(status, answer)
        calls = answer["choices"][0]["message"].get("tool_calls")  # none where the tokens ran out before
        return _of_schema(status, answer["choices"][0], calls[0]["function"]["arguments"] if calls else "")

    async def stream(self, http: aiohttp.ClientSession) -> End:
        return await self._stream(http, self.chance.randint(16, 96), cut=None)

    async def cut_stream(self, http: aiohttp.ClientSession) -> End:
        """Leaves after a few pieces; a connection of its own, as closing it is how a client goes away."""
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=http.timeout, connector=connector) as own:
            return await self._stream(own, 200, cut=self.chance.randint(1, 12))

    async def _stream(self, http: aiohttp.ClientSession, tokens: int, cut: int | None) -> End:
        body = {
            "model": self.model, "prompt": self.prompt(25), "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        written, seen, done = 0, 0, False
        async with http.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return _refusal(answer.status, await answer.json())
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                seen += 1
                if line.startswith(b"data: [DONE]"):
                    done = True
                elif "error" in (piece := json.loads(line[6:])):
                    return End("told", answer.status, str(piece["error"])[:200])
                elif piece.get("usage"):
                    written = piece["usage"]["completion_tokens"]
                if cut is not None and seen >= cut:
                    return End("ok", answer.status)
        return End("ok" if done and written == tokens else "silent", answer.status)

    async def wrong(self, http: aiohttp.ClientSession) -> End:
        what = self.chance.choice(sorted(WRONG))
        method, path, body, right = WRONG[what]
        data = body if isinstance(body, bytes) else json.dumps({"model": self.model} | body).encode()
        headers = {"Content-Type": "application/json"}
        async with http.request(method, self.url + path, data=data, headers=headers) as answer:
            said = await answer.json()
            if answer.status == right and isinstance(said["error"]["message"], str):
                return End("ok", right)
            end = _refusal(answer.status, said)
            return End(end.word, end.status, f"{what}: {end.detail}")

    async def ask(self, http: aiohttp.ClientSession, kind: str) -> End:
        """One request of a kind, whatever becomes of it."""
        try:
            return await KINDS[kind](self, http)
        except aiohttp.ClientConnectorError:
            return End("refused")
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            return End("broken", detail=type(error).__name__)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return End("wrong", detail=f"{type(error).__name__}: {error}"[:200])


def _refusal(status: int, answer: Any) -> End:
    word = "refused" if status == 503 else "told" if status >= 500 else "wrong"
    return End(word, status, str(answer)[:200])


def _of_schema(status: int, choice: Any, text: str) -> End:
    if choice["finish_reason"] == "length":  # JSON allows white space without end
        return End("ok", status)
    try:
        value = json.loads(text)
    except ValueError:
        return End("wrong", status, text[:200])
    fits = value["city"] in ("Paris", "Rome", "Oslo") and value["size"] in (1, 2, 3)
    return End("ok" if fits else "wrong", status, text[:200])


KINDS: dict[str, Callable[[Client, aiohttp.ClientSession], Awaitable[End]]] = {
    "chat": Client.chat,
    "stream": Client.stream,
    "stream cut by the client": Client.cut_stream,
    "long prompt": Client.long_prompt,
    "2 prompts, 3 choices": Client.choices,
    "grammar": Client.grammar,
    "tool": Client.tool,
    "wrong": Client.wrong,
}
# How often each comes, of 16.
MIX = ["chat"] * 3 + ["stream"] * 3 + ["stream cut by the client"] * 3 + ["2 prompts, 3 choices", "long prompt"]
MIX += ["grammar"] * 2 + ["tool"] + ["wrong"] * 2


async def greedy(url: str, model: str) -> list[str]:
    """What the server answers without chance: the same before and after a restart."""
    prompts = ["The capital of France is", "Once upon a time, in a quiet harbour town,"]
    body = {"model": model, "prompt": prompts, "max_tokens": 16, "temperature": 0}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/completions", json=body) as answer:
        return [choice["text"] for choice in (await answer.json())["choices"]]


async def pause(chance: random.Random, longest: float) -> None:
    """What a person does between two requests."""
    await asyncio.sleep(chance.uniform(0, longest))
