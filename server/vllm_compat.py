"""The non-public parts of vLLM the server stands on. Tested with vLLM 0.32.

Source: `vllm/entrypoints/launchers/api_server/entry.py`, whose `run_server` this follows.
"""

import socket
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import vllm.envs as envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["build_app", "build_async_engine_client", "init_app_state", "is_cpu", "parse", "serve", "setup_server"]


def is_cpu() -> bool:
    """Whether vLLM runs on the CPU here."""
    return current_platform.is_cpu()


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse vLLM's own serving arguments; exits with code 2 and vLLM's message on a bad one."""
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="prune-serve DIR --")).parse_args(list(arguments))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


async def serve(app: Any, sock: socket.socket, args: Namespace) -> Awaitable[None]:
    """Run uvicorn on an open socket until a signal or the engine's death; returns what to await last."""
    extra: dict[str, Any] = {}
    if (log_config := get_uvicorn_log_config(args)) is not None:
        extra["log_config"] = log_config
    run: Callable[..., Any] = serve_http
    return await run(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **extra,
    )
