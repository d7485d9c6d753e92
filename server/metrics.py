"""The `shoal_*` instruments, on prometheus_client's default registry, which vLLM's `/metrics` serves."""

from typing import Literal

from prometheus_client import Gauge

from pruning.plan import KINDS
from server.inventory import Inventory

LATEST: Literal["mostrecent"] = "mostrecent"

KV_BYTES = Gauge(
    "shoal_kv_bytes_per_token",
    "KV cache bytes one token takes, as served and in the dense model.",
    ["variant"],
    multiprocess_mode=LATEST,
)
KV_TOKENS = Gauge(
    "shoal_kv_cache_capacity_tokens",
    "Tokens the KV cache holds, and the dense model would hold in the same bytes.",
    ["variant"],
    multiprocess_mode=LATEST,
)
KV_CAPACITY = Gauge("shoal_kv_cache_capacity_bytes", "Bytes of the KV cache.", multiprocess_mode=LATEST)
WEIGHT_BYTES = Gauge(
    "shoal_weight_bytes", "Bytes of the weights, as served and dense.", ["variant"], multiprocess_mode=LATEST
)
SUBLAYERS = Gauge("shoal_sublayers", "Sublayers by kind and state.", ["kind", "state"], multiprocess_mode=LATEST)
ADAPTERS = Gauge("shoal_emulation_parameters", "Numbers in all emulation adapters.", multiprocess_mode=LATEST)


def publish(inventory: Inventory) -> None:
    """Set what does not change while the server runs."""
    KV_BYTES.labels("served").set(inventory.kv_bytes_per_token)
    KV_BYTES.labels("dense").set(inventory.kv_bytes_per_token_dense)
    KV_TOKENS.labels("served").set(inventory.capacity_tokens)
    KV_TOKENS.labels("dense").set(inventory.capacity_tokens_dense)
    KV_CAPACITY.set(inventory.capacity_bytes)
    WEIGHT_BYTES.labels("served").set(inventory.weight_bytes)
    WEIGHT_BYTES.labels("dense").set(inventory.weight_bytes_dense)
    ADAPTERS.set(inventory.emulation_parameters)
    for kind in KINDS:
        for state in ("kept", "removed", "emulated"):
            SUBLAYERS.labels(kind, state).set(inventory.count(kind, state))
