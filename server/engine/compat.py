"""What the server takes from vLLM's entry points. Tested with vLLM 0.32; the import paths of 0.33 are known too.

Every function here wraps something vLLM does not promise to keep; nothing of Shoal's features is in this file. What the
model classes take from vLLM is in `server/engine/vllm.py`.
"""

import logging
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import vllm
import vllm.v1.utils as v1_utils
from fastapi import FastAPI
from vllm import SamplingParams
from vllm.entrypoints.cli.serve import run_multi_api_server
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import app_state, entry
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.third_party import pynvml
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import decorate_logs, set_process_title
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from server.engine.cache_groups import CacheShape, dense_shape_of, full_heads_in, shape_of, windows_of
from server.errors import EngineError, SettingsError

try:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
except ModuleNotFoundError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

TESTED = ("0.32.",)
TRACED = {"mode": 2, "backend": "eager"}  # torch.compile without code generation: seconds, not minutes
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
        windows: Block -> W, of the layers that are limited.
        full_heads: Block -> the KV heads that keep every token, of layers that are limited in part.
        shape: Of the cache; None: not looked at.
        dense_shape: Of the dense model's, without a draft.
        pool_blocks: Blocks that the caches of all engines have.
        chunk_tokens: Tokens that one step takes, at most.
        hybrid: Whether limited layers give back the blocks behind their windows.
    """

    capacity_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_tensors: int
    kv_dtype_bytes: int
    max_running: int
    max_model_len: int
    windows: Mapping[int, int] = field(default_factory=dict)
    full_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    shape: CacheShape | None = None
    dense_shape: CacheShape | None = None
    pool_blocks: int = 0
    chunk_tokens: int = 1
    hybrid: bool = True


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
        if current_platform.is_cpu() and args.pipeline_parallel_size > 1 and args.enforce_eager:
            # vLLM makes the tensors between stages in its warm-up, which a CPU worker leaves out in eager mode.
            args.enforce_eager, args.compilation_config = False, TRACED
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        launcher.validate_api_server_args(args)
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"vLLM argument: {' '.join(str(error).split())}") from error
    return args


def set_parsers(args: Namespace, tools: str | None, reasoning: str | None) -> None:
    """Name the parsers of tool calls and of reasoning where vLLM's own arguments do not.

    Raises:
        SettingsError: There is no such parser.
    """
    if tools and not args.tool_call_parser:
        args.tool_call_parser, args.enable_auto_tool_choice = tools, True
    if reasoning and not args.structured_outputs_config.reasoning_parser and not args.reasoning_parser:
        args.reasoning_parser = args.structured_outputs_config.reasoning_parser = reasoning
    try:
        launcher.validate_api_server_args(args)
    except KeyError as error:
        raise SettingsError(f"vLLM argument: {error.args[0]}") from error


def parsers(args: Namespace) -> tuple[str | None, str | None]:
    """Parsers of tool calls and of reasoning."""
    return args.tool_call_parser, args.reasoning_parser or args.structured_outputs_config.reasoning_parser or None


def listen(args: Namespace) -> socket.socket:
    """Bind the API's socket before the engine starts, so that a taken port costs no minute.

    Raises:
        SettingsError: The address cannot be bound.
    """
    try:
        return launcher.setup_server(args, reuse_port=False)[1]
    except OSError as error:
        raise SettingsError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from error


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket of our own.

    Raises:
        SettingsError: The address cannot be bound.
    """
    try:
        return launcher.create_server_socket((host, port), reuse_port=False)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


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


def take_cors(args: Namespace) -> dict[str, Any]:
    """Options of a CORS middleware out of vLLM's arguments.

    They are ours to apply from then on: vLLM's middleware would leave the answers of all that is around it without.
    """
    names = {"allow_origins": "allowed_origins", "allow_credentials": "allow_credentials",
             "allow_methods": "allowed_methods", "allow_headers": "allowed_headers"}  # fmt: skip
    options = {name: getattr(args, argument) for name, argument in names.items()}
    args.allowed_origins = []
    return options


async def stock_app(engine: Any, args: Namespace) -> FastAPI:
    """vLLM's own OpenAI application on this engine, all routes and handlers in place."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await app_state.init_app_state(engine, app.state, args, tasks)
    if app.state.serving_structured_decisions is None:  # else it is documented, and answers 501 to everything
        app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) != "/v1/systemone"]
    return app


def peer_loads(client_config: dict[str, Any] | None) -> Any:
    """Take what API processes know of each other's load out of the configuration of one of them."""
    if client_config is None or "api_server_loads" not in client_config:
        return None
    return client_config.pop("api_server_loads"), client_config["client_index"]


def http_server(config: Any, loads: Any = None) -> Any:
    """A uvicorn server that leaves signals alone and shares its socket with its sibling processes by their load."""
    return launcher.NoSignalServer(config, peer_loads=loads)


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


def run_api_processes(args: Namespace, worker: Callable[..., None]) -> int:
    """Run `--api-server-count` API processes on the same engines; `worker` is what each runs.

    vLLM offers no way to name another worker, but looks its own up when it starts the processes.

    Returns:
        Exit code 0: stopped by a signal, every process drained.

    Raises:
        SettingsError: The address cannot be bound, or vLLM cannot serve the model or an argument.
        EngineError: An engine or an API process died.
    """
    args.shutdown_timeout += 5  # what a process needs after its grace period to close the rest
    stock, v1_utils.run_api_server_worker_proc = v1_utils.run_api_server_worker_proc, worker
    try:
        run_multi_api_server(args)
    except RuntimeError as error:
        raise EngineError(" ".join(str(error).split())) from error
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise SettingsError(f"cannot serve {args.model}: {' '.join(str(error).split())}") from error
    finally:
        v1_utils.run_api_server_worker_proc = stock
    return 0


def enter_api_process(args: Namespace, client_config: dict[str, Any] | None) -> None:
    """Set logging and the title of an API process up as vLLM does in its own."""
    configure_logging_from_args(args)
    set_process_title("APIServer", str((client_config or {}).get("client_index", 0)))
    decorate_logs()


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
        windows=windows_of(model.hf_text_config),
        full_heads=full_heads_in(model.hf_text_config),
        shape=shape_of(config),
        dense_shape=dense_shape_of(config),
        pool_blocks=int(cache.num_gpu_blocks or 0),
        chunk_tokens=int(config.scheduler_config.max_num_batched_tokens),
        hybrid=not config.scheduler_config.disable_hybrid_kv_cache_manager,
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


async def model_cards(app: FastAPI) -> dict[str, Any]:
    """What vLLM's own `/v1/models` answers."""
    return (await app.state.openai_serving_models.show_available_models()).model_dump()


def stores_responses() -> bool:
    """Whether `/v1/responses` keeps what it answered."""
    return bool(vllm.envs.VLLM_ENABLE_RESPONSES_API_STORE)


def scores_prompts(args: Namespace) -> bool:
    """Whether a request for log-probabilities of its prompt leaves the engine alive.

    vLLM 0.32 and 0.33 compute them with LoRA's logits, whose CPU kernels count one row a request.
    """
    return not (current_platform.is_cpu() and args.enable_lora)


def metrics_registry() -> Any:
    """The Prometheus registry a scrape reads: of all API processes, where there are several."""
    return get_prometheus_registry()


def device_memory() -> list[tuple[str, int, int]]:
    """(index, bytes used, bytes in all) of each NVIDIA GPU, without touching CUDA; empty where there is none."""
    if not current_platform.is_cuda():
        return []
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        readings = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return [(str(i), int(reading.used), int(reading.total)) for i, reading in enumerate(readings)]
    finally:
        pynvml.nvmlShutdown()


def refresh_certificates(config: Any, args: Namespace) -> Callable[[], None]:
    """Read TLS files again when they change, where `--enable-ssl-refresh` asks for it; gives what ends that."""
    if not args.enable_ssl_refresh or config.ssl is None:
        return lambda: None
    return SSLCertRefresher(config.ssl, args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs).stop


def death_watch(engine: Any, root: int | None) -> Callable[[], bool]:
    """How to ask whether the engine is dead.

    A client that started its engines hears of their death from vLLM. One of several API processes hears nothing when
    an engine is killed; it looks for the engine among its parent's processes, and tells its client, which ends every
    open request with an error.

    Args:
        engine: vLLM's engine client.
        root: Process that started the engines; None: this one.
    """
    title = f"{vllm.envs.VLLM_PROCESS_NAME_PREFIX}::EngineCore"
    siblings = [] if root is None else psutil.Process(root).children()
    engines = [process for process in siblings if "".join(process.cmdline()[:1]).startswith(title)]

    def dead() -> bool:
        if not engine.errored and not all(map(_lives, engines)):
            engine.engine_core.resources.engine_dead = True
            engine.engine_core.outputs_queue.put_nowait(EngineDeadError())
        return bool(engine.errored)

    return dead


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shut_down(engine: Any, timeout_seconds: float) -> None:
    """Stop the engine processes of this client."""
    engine.shutdown(timeout=timeout_seconds)
