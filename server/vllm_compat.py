"""What the server takes from vLLM's entry points. Tested with vLLM 0.32.

Every function here wraps something vLLM does not promise to keep; nothing of Shoal's features is in this file. What the
model classes take from vLLM is in `server/vllm_models.py`.
"""

import logging
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import vllm
from fastapi import FastAPI
from vllm import SamplingParams
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import app_state, entry
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from server.errors import EngineError, SettingsError

TESTED = ("0.32.",)
VERSION: str = vllm.__version__
logger = logging.getLogger("shoal.vllm")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the running engine says about itself.

    Attributes:
        capacity_tokens: Tokens the KV cache of all engines holds.
        layers: Blocks of the served model.
        kv_heads: K, over all tensor-parallel ranks.
        head_dim: Of one head.
        kv_tensors: 2 for keys and values, 1 for latent attention.
        kv_dtype_bytes: Of one cached number.
        max_running: Requests all engines run at once.
        max_model_len: Tokens of one sequence.
    """

    capacity_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_tensors: int
    kv_dtype_bytes: int
    max_running: int
    max_model_len: int


class _Parser(FlexibleArgumentParser):
    """vLLM's parser with one-line errors."""

    def error(self, message: str) -> Any:
        raise SettingsError(f"vLLM argument: {' '.join(message.split())}")


def warn_if_untested() -> None:
    """Log a warning when this vLLM is not one the server was tested with."""
    if not VERSION.startswith(TESTED):
        logger.warning("vLLM %s was not tested with this release (tested: %s*)", VERSION, "*, ".join(TESTED))


def parse_arguments(tokens: Sequence[str], defaults: dict[str, Any]) -> Namespace:
    """Parse `vllm serve` arguments.

    Args:
        tokens: The model and everything after `--`.
        defaults: Values of arguments that `tokens` does not name.

    Raises:
        SettingsError: An argument is unknown or wrong.
    """
    cli_env_setup()
    parser = make_arg_parser(_Parser(prog="prune-serve"))
    if current_platform.is_cpu():
        # Compiling takes minutes on a CPU, half precision is emulated there, and vLLM would take half the memory.
        defaults = {"enforce_eager": True, "dtype": "float32"} | defaults
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    parser.set_defaults(**defaults)
    try:
        args = parser.parse_args(list(tokens))
        args.model = args.model_tag
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        launcher.validate_api_server_args(args)
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"vLLM argument: {' '.join(str(error).split())}") from error
    return args


def listen(args: Namespace, *, reuse_port: bool = False) -> socket.socket:
    """Bind the API's socket before the engine starts, so that a taken port costs no minute.

    Raises:
        SettingsError: The address cannot be bound.
    """
    try:
        return launcher.setup_server(args, reuse_port=reuse_port)[1]
    except OSError as error:
        raise SettingsError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from error


@asynccontextmanager
async def open_engine(args: Namespace, client_config: dict[str, Any] | None = None) -> AsyncIterator[Any]:
    """Start the engine processes (or join those of `client_config`) and stop them at the end.

    Raises:
        SettingsError: The model or an argument is not what vLLM can serve.
        EngineError: The engine failed while starting.
    """
    context = entry.build_async_engine_client(args, client_config=client_config)
    try:
        engine = await context.__aenter__()
    except RuntimeError as error:
        raise EngineError(f"the engine did not start: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise SettingsError(f"cannot serve {args.model}: {' '.join(str(error).split())}") from error
    try:
        yield engine
    finally:
        await context.__aexit__(None, None, None)


async def stock_app(engine: Any, args: Namespace) -> FastAPI:
    """vLLM's own OpenAI application on this engine, all routes and handlers in place."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await app_state.init_app_state(engine, app.state, args, tasks)
    return app


def http_server(config: Any, client_config: dict[str, Any] | None = None) -> Any:
    """A uvicorn server that leaves signals alone and shares one socket with its sibling processes."""
    config_of_clients = client_config or {}
    loads = config_of_clients.pop("api_server_loads", None)
    return launcher.NoSignalServer(config, peer_loads=(loads, config_of_clients["client_index"]) if loads else None)


def uvicorn_options(args: Namespace) -> dict[str, Any]:
    """The uvicorn options `vllm serve` takes from its arguments, TLS among them."""
    return {
        "host": args.host,
        "port": args.port,
        "timeout_keep_alive": vllm.envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "ssl_keyfile": args.ssl_keyfile,
        "ssl_certfile": args.ssl_certfile,
        "ssl_ca_certs": args.ssl_ca_certs,
        "ssl_cert_reqs": args.ssl_cert_reqs,
        "ssl_ciphers": args.ssl_ciphers,
        "h11_max_incomplete_event_size": args.h11_max_incomplete_event_size,
    }


def run_api_processes(args: Namespace, worker: Callable[..., None]) -> None:
    """Run `--api-server-count` API processes; `worker` is what each runs.

    vLLM offers no way to name another worker, but looks its own up when it starts the processes.
    """
    import vllm.v1.utils
    from vllm.entrypoints.cli.serve import run_multi_api_server

    stock, vllm.v1.utils.run_api_server_worker_proc = vllm.v1.utils.run_api_server_worker_proc, worker
    try:
        run_multi_api_server(args)
    finally:
        vllm.v1.utils.run_api_server_worker_proc = stock


def engine_facts(engine: Any) -> EngineFacts:
    """Read the sizes of the running engine."""
    config, model = engine.vllm_config, engine.model_config
    cache, engines = config.cache_config, config.parallel_config.data_parallel_size
    if cache.kv_cache_size_tokens is not None:
        capacity = cache.kv_cache_size_tokens * engines
    else:
        capacity = (cache.num_gpu_blocks or 0) * cache.block_size
    dtype_bytes = 1 if "8" in str(cache.cache_dtype) else model.dtype.itemsize
    if cache.cache_dtype == "bfloat16":
        dtype_bytes = 2
    latent = bool(model.use_mla)
    return EngineFacts(
        capacity_tokens=int(capacity),
        layers=int(model.hf_text_config.num_hidden_layers),
        kv_heads=1 if latent else int(model.get_total_num_kv_heads()),
        head_dim=int(model.get_head_size()),
        kv_tensors=1 if latent else 2,
        kv_dtype_bytes=dtype_bytes,
        max_running=int(config.scheduler_config.max_num_seqs) * engines,
        max_model_len=int(model.max_model_len),
    )


async def first_token(engine: Any) -> None:
    """Generate one token, through the whole engine.

    A model that does not generate (embeddings) is asked for its health instead.
    """
    if "generate" not in await engine.get_supported_tasks():
        await engine.check_health()
        return
    prompt = {"prompt_token_ids": [1]}
    async for _ in engine.generate(prompt, SamplingParams(max_tokens=1), "shoal-first-token"):
        pass


def shut_down(engine: Any, timeout_seconds: float) -> None:
    """Stop the engine processes of this client."""
    engine.shutdown(timeout=timeout_seconds)
