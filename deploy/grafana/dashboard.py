"""The Grafana dashboard, made from a table of panels: `python deploy/grafana/dashboard.py > deploy/grafana/shoal.json`.

Rows of panels, each panel a title, a unit and PromQL expressions with their legends. `$instance` is chosen on the page;
`$__rate_interval` is Grafana's own.
"""

import json
import math
from typing import Any

SOURCE = {"type": "prometheus", "uid": "prometheus"}
HERE = 'job="shoal",instance=~"$instance"'
Query = tuple[str, str]
# (title, unit, what it shows, queries)
Panel = tuple[str, str, str, list[Query]]


def quantiles(family: str) -> list[Query]:
    """p50, p90 and p99 of a histogram over all chosen replicas."""
    buckets = f"sum by (le) (rate({family}_bucket{{{HERE}}}[$__rate_interval]))"
    return [(f"histogram_quantile({share}, {buckets})", f"p{share * 100:.0f}") for share in (0.5, 0.9, 0.99)]


def rate(family: str, by: str) -> str:
    """Sum of the rates of a counter."""
    return f"sum by ({by}) (rate({family}{{{HERE}}}[$__rate_interval]))"


def saved(family: str) -> str:
    """Share of the dense model's bytes that the served one does without."""
    served, dense = (f'avg({family}{{variant="{variant}",{HERE}}})' for variant in ("served", "dense"))
    return f"1 - {served} / {dense}"


def by_length(family: str) -> list[Query]:
    """A family with the length of a request as its label, as served and dense; empty without windows."""
    return [(f"avg by (variant, context) ({family}{{{HERE}}})", "{{variant}}, {{context}} tokens")]


def saved_by_length() -> str:
    """Share of a dense request's bytes that a served one does without, by its length."""
    served, dense = (
        f'avg by (context) (shoal_kv_request_bytes{{variant="{variant}",{HERE}}})' for variant in ("served", "dense")
    )
    return f"1 - {served} / {dense}"


def beyond_dense() -> str:
    """Tokens in use above what the dense model's cache would hold."""
    held, dense = (
        f'max by (instance) (shoal_kv_cache_capacity_tokens{{variant="{variant}",{HERE}}})'
        for variant in ("served", "dense")
    )
    used = f"max by (instance) (vllm:kv_cache_usage_perc{{{HERE}}})"
    return f"clamp_min({used} * {held} - {dense}, 0)"


def hit_rate() -> str:
    """Share of the prompt tokens looked up in the prefix cache that were there."""
    hits, asked = (rate(f"vllm:prefix_cache_{what}_total", "instance") for what in ("hits", "queries"))
    return f"{hits} / {asked}"


def preempted() -> str:
    """Preemptions per finished request."""
    return f"{rate('vllm:num_preemptions_total', 'instance')} / {rate('vllm:request_success_total', 'instance')}"


ROWS: dict[str, list[Panel]] = {
    "Service": [
        ("Replicas ready", "short", "Replicas that take requests, and those that are scraped.", [
            (f"sum(shoal_ready{{{HERE}}})", "ready"), ('count(up{job="shoal"})', "known")]),
        ("Requests", "reqps", "Finished requests by status.",
            [(rate("shoal_request_duration_seconds_count", "status"), "{{status}}")]),
        ("Turned away", "reqps", "Refused at the door, by reason.",
            [(rate("shoal_admission_rejected_total", "reason"), "{{reason}}")]),
        ("Whole requests", "s", "From arrival to the last byte.", quantiles("shoal_request_duration_seconds")),
    ],
    "Latency and objectives": [
        ("Time to first token", "s", "As the engine measures it; the objective is 2.5 s.",
            quantiles("vllm:time_to_first_token_seconds")),
        ("Between tokens", "s", "As the engine measures it; the objective is 0.2 s.",
            quantiles("vllm:inter_token_latency_seconds")),
        ("First-token budget burn", "short", "1 spends the month's budget in a month; 14.4 over an hour pages.", [
            ("shoal:ttft_burn:5m", "{{model_name}} 5m"), ("shoal:ttft_burn:1h", "{{model_name}} 1h")]),
        ("Inter-token budget burn", "short", "1 spends the month's budget in a month; 14.4 over an hour pages.", [
            ("shoal:itl_burn:5m", "{{model_name}} 5m"), ("shoal:itl_burn:1h", "{{model_name}} 1h")]),
    ],
    "Engine": [
        ("Running and waiting", "short", "Requests in the engine.", [
            (f"vllm:num_requests_running{{{HERE}}}", "{{instance}} running"),
            (f"vllm:num_requests_waiting{{{HERE}}}", "{{instance}} waiting")]),
        ("KV cache in use", "percentunit", "Share of the blocks.", [
            (f"vllm:kv_cache_usage_perc{{{HERE}}}", "{{instance}}")]),
        ("Tokens", "short", "Tokens a second, read and written.", [
            (f"sum(rate(vllm:prompt_tokens_total{{{HERE}}}[$__rate_interval]))", "prompt"),
            (f"sum(rate(vllm:generation_tokens_total{{{HERE}}}[$__rate_interval]))", "generated")]),
        ("Tokens waiting for cache", "short", "What the requests inside ask for beyond what the KV cache holds.",
            [(f"shoal_admission_queued_tokens{{{HERE}}}", "{{instance}}")]),
        ("Preemptions", "ops", "Requests whose cache was taken away; they are computed again.",
            [(rate("vllm:num_preemptions_total", "instance"), "{{instance}}")]),
    ],
    "Is the pruning paying": [
        ("KV cache tokens", "short", "What the cache holds, and what the dense model would hold in the same bytes.",
            [(f"avg by (variant) (shoal_kv_cache_capacity_tokens{{{HERE}}})", "{{variant}}")]),
        ("Saved", "percentunit", "Share of the dense model's KV cache of a token, and of its weights, that is gone.", [
            (saved("shoal_kv_bytes_per_token"), "KV cache"), (saved("shoal_weight_bytes"), "weights")]),
        ("Tokens that fit, by length of a request", "short",
            "With windows: requests of 1,024, of 8,192 and of the longest length, as served and dense.",
            by_length("shoal_kv_cache_fitting_tokens")),
        ("KV cache of one request", "bytes", "With windows: by its length, as served and dense.",
            by_length("shoal_kv_request_bytes")),
        ("Saved of one request", "percentunit", "With windows: share of its dense bytes, by its length.",
            [(saved_by_length(), "{{context}} tokens")]),
        ("Layers with a window", "short", "Attention layers that keep their last tokens only.",
            [(f'max by (instance) (shoal_sublayers{{kind="attention",state="limited",{HERE}}})', "{{instance}}")]),
        ("KV heads", "short", "Full: cached as in the dense model. Limited: a window only. Removed: no cache.",
            [(f"max by (state) (shoal_kv_heads{{{HERE}}})", "{{state}}")]),
        ("Tokens beyond a dense cache", "short",
            "Tokens in use that the dense model could not hold in these bytes; above 0 the pruning is in use.",
            [(beyond_dense(), "{{instance}}")]),
        ("Time in queue", "s", "Until the engine takes a request up: what a larger cache shortens.",
            quantiles("vllm:request_queue_time_seconds")),
        ("Prefix cache hits", "percentunit", "Share of prompt tokens found in the cache; a larger cache keeps more.",
            [(hit_rate(), "{{instance}}")]),
        ("Preempted requests", "percentunit", "Preemptions per finished request: 0 while the cache is large enough.",
            [(preempted(), "{{instance}}")]),
        ("Sublayers", "short", "Kept, limited, emulated and removed.",
            [(f"max by (kind, state) (shoal_sublayers{{{HERE}}})", "{{kind}} {{state}}")]),
        ("Emulation parameters", "short", "Of the adapters that stand in for removed sublayers.",
            [(f"shoal_emulation_parameters{{{HERE}}}", "{{instance}}")]),
    ],
    "Processes": [
        ("Resident memory", "bytes", "Server and engine processes.",
            [(f"shoal_process_resident_memory_bytes{{{HERE}}}", "{{instance}}")]),
        ("GPU memory", "bytes", "In use and in all; empty without a GPU.",
            [(f"shoal_device_memory_bytes{{{HERE}}}", "{{instance}} {{device}} {{state}}")]),
        ("CPU", "short", "Cores in use by the server's process.",
            [(rate("process_cpu_seconds_total", "instance"), "{{instance}}")]),
        ("Tasks of the API", "short", "Grow without end only if requests leak.",
            [(f"shoal_event_loop_tasks{{{HERE}}}", "{{instance}}")]),
    ],
}  # fmt: skip


def panel(number: int, column: int, row: int, described: Panel) -> dict[str, Any]:
    """One time series panel, a quarter of the page wide."""
    title, unit, description, queries = described
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"x": 6 * column, "y": row, "w": 6, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard, in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for index, (title, described) in enumerate(ROWS.items()):
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        panels.append(
            {"id": 1000 + index, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        panels += [panel(20 * index + i + 1, i % 4, top + 1 + 8 * (i // 4), one) for i, one in enumerate(described)]
        top += 1 + 8 * math.ceil(len(described) / 4)
    variable = {
        "name": "instance", "label": "Replica", "type": "query", "datasource": SOURCE, "refresh": 2,
        "query": {"query": 'label_values(up{job="shoal"}, instance)', "refId": "instance"},
        "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    return {
        "uid": "shoal",
        "title": "Shoal",
        "tags": ["shoal", "vllm"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [variable]},
        "annotations": {"list": []},
        "panels": panels,
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
