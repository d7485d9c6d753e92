"""The `shoal_*` instruments, on prometheus_client's default registry, which vLLM's `/metrics` serves."""

from prometheus_client import Gauge

from server.facts import Facts

KV_BYTES = Gauge(
    "shoal_kv_bytes_per_token",
    "KV cache bytes one token takes, as served and in the dense model.",
    ["variant"],
    multiprocess_mode="mostrecent",
)
KV_TOKENS = Gauge(
    "shoal_kv_cache_capacity_tokens",
    "Tokens the KV cache holds, and the dense model would hold in the same bytes.",
    ["variant"],
    multiprocess_mode="mostrecent",
)
WEIGHT_BYTES = Gauge(
    "shoal_weight_bytes", "Bytes of the weights, as served and dense.", ["variant"], multiprocess_mode="mostrecent"
)
SUBLAYERS = Gauge("shoal_sublayers", "Sublayers by kind and state.", ["kind", "state"], multiprocess_mode="mostrecent")


def publish(facts: Facts, kv_tokens: int) -> None:
    """Set what does not change while the server runs."""
    KV_BYTES.labels("served").set(facts.kv_per_token)
    KV_BYTES.labels("dense").set(facts.kv_per_token_dense)
    KV_TOKENS.labels("served").set(kv_tokens)
    KV_TOKENS.labels("dense").set(facts.dense_tokens(kv_tokens))
    WEIGHT_BYTES.labels("served").set(facts.weights)
    WEIGHT_BYTES.labels("dense").set(facts.weights_dense)
    for (kind, state), count in facts.sublayers.items():
        SUBLAYERS.labels(kind, state).set(count)
