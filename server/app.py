"""vLLM's OpenAI-compatible application with Shoal's routes, from engine start to shutdown."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from server.facts import Facts, read_facts
from server.metrics import publish
from server.vllm_compat import build_app, build_async_engine_client, init_app_state, serve, setup_server


def kv_tokens(engine_client: Any) -> int:
    """Tokens the running engine's KV cache holds."""
    cache = engine_client.vllm_config.cache_config
    return int(cache.num_gpu_blocks) * int(cache.block_size)


def kv_line(tokens: int, facts: Facts | None) -> str:
    """The line printed at start."""
    if facts is None:
        return f"KV cache: {tokens:,} tokens (dense model)"
    return f"KV cache: {tokens:,} tokens (the dense model would hold {facts.dense_tokens(tokens):,} in the same bytes)"


def curl_line(args: Namespace) -> str:
    """A request to try."""
    host = args.host or "localhost"
    body = f'{{"model": "{args.served_model_name[0]}", "temperature": 0, "messages": [{{"role": "user", "content": '
    body += '"What is the capital of France?"}]}'
    return f"Try: curl http://{host}:{args.port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def add_routes(app: FastAPI, engine_client: Any) -> None:
    """Health routes: live while the engine is, ready once the server answers."""

    @app.get("/health/live")
    @app.get("/health/ready")
    @app.get("/health/startup")
    async def health() -> Response:
        return Response(status_code=503 if engine_client.errored else 200)


async def run(args: Namespace) -> bool:
    """Serve until told to stop.

    Returns:
        Whether the engine was still alive at the end.
    """
    _, sock = setup_server(args, reuse_port=False)
    facts = read_facts(Path(args.model))
    async with build_async_engine_client(args) as engine_client:
        tasks = await engine_client.get_supported_tasks()
        app = build_app(args, tasks, engine_client.model_config)
        await init_app_state(engine_client, app.state, args, tasks)
        add_routes(app, engine_client)
        tokens = kv_tokens(engine_client)
        if facts is not None:
            publish(facts, tokens)
        print(kv_line(tokens, facts), flush=True)
        print(curl_line(args), flush=True)
        last = await serve(app, sock, args)
        alive = not engine_client.errored
    try:
        await last
    finally:
        sock.close()
    return alive
