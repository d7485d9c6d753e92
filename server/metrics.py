"""The `shoal_*` instruments, on prometheus_client's default registry, which vLLM's `/metrics` serves.

Every gauge states how several API processes are combined; `docs/use/metrics.md` lists them all.
"""

import asyncio
import time
from typing import Literal

import psutil
from prometheus_client import Counter, Gauge, Histogram
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pruning.plan import KINDS
from server.engine.compat import device_memory
from server.inventory import STATES, Inventory

LATEST: Literal["mostrecent"] = "mostrecent"
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)

BUILD = Gauge(
    "shoal_build_info", "Always 1; the labels say what runs.", ["version", "vllm_version", "model_name"],
    multiprocess_mode=LATEST,
)  # fmt: skip
READY = Gauge("shoal_ready", "1 while new requests are taken, else 0.", multiprocess_mode="livemin")
KV_BYTES = Gauge(
    "shoal_kv_bytes_per_token", "KV cache bytes of one token, as served and in the dense model.", ["variant"],
    multiprocess_mode=LATEST,
)  # fmt: skip
KV_TOKENS = Gauge(
    "shoal_kv_cache_capacity_tokens",
    "Tokens the KV cache holds, and the dense model would hold in the same bytes.",
    ["variant"],
    multiprocess_mode=LATEST,
)
KV_CAPACITY = Gauge("shoal_kv_cache_capacity_bytes", "Bytes of the KV cache.", multiprocess_mode=LATEST)
REQUEST_BYTES = Gauge(
    "shoal_kv_request_bytes",
    "KV cache bytes of one request by its length; only where attention is limited to windows.",
    ["variant", "context"],
    multiprocess_mode=LATEST,
)
FITTING_TOKENS = Gauge(
    "shoal_kv_cache_fitting_tokens",
    "Tokens of requests of one length that fit; only where attention is limited to windows.",
    ["variant", "context"],
    multiprocess_mode=LATEST,
)
WEIGHT_BYTES = Gauge(
    "shoal_weight_bytes", "Bytes of the weights, as served and dense.", ["variant"], multiprocess_mode=LATEST
)
SUBLAYERS = Gauge("shoal_sublayers", "Sublayers by kind and state.", ["kind", "state"], multiprocess_mode=LATEST)
KV_HEADS = Gauge(
    "shoal_kv_heads",
    "KV heads of all layers: cached as in the dense model, with a window, or without a cache.",
    ["state"],
    multiprocess_mode=LATEST,
)
ADAPTERS = Gauge("shoal_emulation_parameters", "Numbers in all emulation adapters.", multiprocess_mode=LATEST)
RESIDENT = Gauge(
    "shoal_process_resident_memory_bytes",
    "Resident memory of the server and its engine processes, in bytes.",
    multiprocess_mode="livemax",
)
DEVICE = Gauge(
    "shoal_device_memory_bytes", "Memory of each GPU, in use and in all, in bytes; no samples without a GPU.",
    ["device", "state"], multiprocess_mode=LATEST,
)  # fmt: skip
TASKS = Gauge(
    "shoal_event_loop_tasks", "asyncio tasks of the API processes; grows without end only if requests leak.",
    multiprocess_mode="livesum",
)  # fmt: skip
ACCEPTED = Counter("shoal_admission_accepted_total", "Requests let in.")
REJECTED = Counter("shoal_admission_rejected_total", "Requests refused at the door, by reason.", ["reason"])
QUEUE_DEPTH = Gauge(
    "shoal_admission_queue_depth", "Sequences inside beyond those the engine runs at once.", multiprocess_mode="livesum"
)
QUEUED_TOKENS = Gauge(
    "shoal_admission_queued_tokens",
    "Tokens that the requests inside ask for beyond those the KV cache holds.",
    multiprocess_mode="livesum",
)
DURATION = Histogram(
    "shoal_request_duration_seconds", "From the request's arrival to its last byte.", ["route", "status"],
    buckets=SECONDS,
)  # fmt: skip
TTFT = Histogram(
    "shoal_time_to_first_token_seconds", "From a streamed request's arrival to its first bytes of body.",
    ["route", "status"], buckets=SECONDS,
)  # fmt: skip
ITL = Histogram(
    "shoal_inter_token_latency_seconds", "Between two consecutive pieces of a streamed answer.", ["route", "status"],
    buckets=SECONDS,
)  # fmt: skip


def publish(inventory: Inventory, version: str, vllm_version: str, model_name: str) -> None:
    """Set what does not change while the server runs."""
    BUILD.labels(version, vllm_version, model_name).set(1)
    KV_BYTES.labels("served").set(inventory.kv_bytes_per_token)
    KV_BYTES.labels("dense").set(inventory.kv_bytes_per_token_dense)
    KV_TOKENS.labels("served").set(inventory.capacity_tokens)
    KV_TOKENS.labels("dense").set(inventory.capacity_tokens_dense)
    KV_CAPACITY.set(inventory.capacity_bytes)
    for context in inventory.contexts:
        REQUEST_BYTES.labels("served", context.tokens).set(context.request_bytes)
        REQUEST_BYTES.labels("dense", context.tokens).set(context.request_bytes_dense)
        FITTING_TOKENS.labels("served", context.tokens).set(context.fitting_tokens)
        FITTING_TOKENS.labels("dense", context.tokens).set(context.fitting_tokens_dense)
    WEIGHT_BYTES.labels("served").set(inventory.weight_bytes)
    WEIGHT_BYTES.labels("dense").set(inventory.weight_bytes_dense)
    ADAPTERS.set(inventory.emulation_parameters)
    for head_state, count in inventory.kv_heads().items():
        KV_HEADS.labels(head_state).set(count)
    for kind in KINDS:
        for state in STATES:
            SUBLAYERS.labels(kind, state).set(inventory.count(kind, state))


def read_memory(root: int | None = None) -> None:
    """Set the resident memory of a process and its children, and the memory of the GPUs.

    Args:
        root: Process id; None: this process.
    """
    total = 0
    first = psutil.Process(root)
    for process in (first, *first.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    RESIDENT.set(total)
    for device, used, size in device_memory():
        DEVICE.labels(device, "used").set(used)
        DEVICE.labels(device, "total").set(size)


class Measure:
    """Middleware: times every request by route and status, and the pieces of those that stream.

    Args:
        app: What it wraps.
        root: Process whose memory, with its children's, a scrape reports; None: this one.
    """

    def __init__(self, app: ASGIApp, root: int | None = None) -> None:
        self.app, self.root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and watch what is sent; unknown paths share one label, so that clients cannot make more."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].rstrip("/") == "/metrics":
            TASKS.set(len(asyncio.all_tasks()))
            await run_in_threadpool(read_memory, self.root)
        start = time.perf_counter()
        status, streams, last = "000", False, None

        async def watched(message: Message) -> None:
            nonlocal status, streams, last
            if message["type"] == "http.response.start":
                status = str(message["status"])
                streams = any(k == b"content-type" and b"event-stream" in v for k, v in message["headers"])
            elif streams and message.get("body"):
                now = time.perf_counter()
                since = start if last is None else last
                (TTFT if last is None else ITL).labels(_route(scope), status).observe(now - since)
                last = now
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            DURATION.labels(_route(scope), status).observe(time.perf_counter() - start)


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)
    return path or (scope["path"].rstrip("/") if "endpoint" in scope else "unmatched")
