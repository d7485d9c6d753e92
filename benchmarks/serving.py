"""vLLM on a dense model and on pruned ones, paired: engines live side by side and take turns, one busy at a time.

python benchmarks/serving.py smollm2-135m PRUNED... --output benchmarks/results/serving.json

The KV-bound load: every engine gets the same bytes of KV cache, few enough that the dense model cannot hold all
requests, and runs as many at once as fit in full. Beside what is measured stands what a model of two costs predicts:
    seconds = R * prefill(P) + ceil(R / B) * D * step(B)
with R requests of P prompt tokens that write D tokens each, B of them at once (they start and end together, so they go
in waves), and both costs measured on the same engine when it is not KV-bound.
The limit is the ratio of KV bytes per token, dense / pruned: reached when a step costs the same at any B.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine
from worker import Worker, start_worker

BLOCK = 128  # tokens in a KV block


def worker(options: dict[str, Any]) -> None:
    """Serve one model to the parent: a workload a line in, its timings a line out."""
    began = time.perf_counter()
    out, sys.stdout = sys.stdout, sys.stderr
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["model"], dtype="float32", enforce_eager=True, enable_prefix_caching=False, block_size=BLOCK,
        max_model_len=options["max_model_len"], num_gpu_blocks_override=options["blocks"],
        max_num_seqs=options["max_num_seqs"], max_num_batched_tokens=2048, disable_log_stats=True,
        skip_tokenizer_init=True,
    )  # fmt: skip
    engine = llm.llm_engine
    blocks = engine.vllm_config.cache_config.num_gpu_blocks
    print(json.dumps({"start_seconds": time.perf_counter() - began, "blocks": blocks}), file=out, flush=True)
    serial = 0
    for line in sys.stdin:
        load = json.loads(line)
        chance = random.Random(load["seed"])
        sampling = SamplingParams(temperature=0, max_tokens=load["new"], ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        for _ in range(load["requests"]):
            serial += 1
            ids = [chance.randrange(100, 40000) for _ in range(load["prompt"])]
            engine.add_request(str(serial), {"prompt_token_ids": ids}, sampling)
            times[str(serial)] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen = times[output.request_id]
                seen += [time.perf_counter() - began] * (len(output.outputs[0].token_ids) - len(seen))
        seconds = time.perf_counter() - began
        gaps = [b - a for seen in times.values() for a, b in itertools.pairwise(seen)]
        result = {"seconds": seconds, "ttft": [seen[0] for seen in times.values()], "itl": statistics.median(gaps)}
        print(json.dumps(result), file=out, flush=True)


@dataclass
class Engine(Worker):
    """A worker process and what is known of its model."""

    kv_bytes: int
    concurrent: int
    started: dict[str, Any]

    def run(self, requests: int, prompt: int, new: int, seed: int) -> dict[str, Any]:
        """Send a workload and wait for its timings."""
        return self.ask({"requests": requests, "prompt": prompt, "new": new, "seed": seed})


def kv_bytes_of(directory: Path) -> int:
    """KV cache bytes of one token, float32."""
    config = json.loads((directory / "config.json").read_text())
    layers = config.get("block_configs") or [{"attention": {"no_op": False}}] * config["num_hidden_layers"]
    kept = sum(not one["attention"]["no_op"] for one in layers)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * kept * config["num_key_value_heads"] * head * 4


def start(name: str, directory: Path, pool_bytes: int, blocks_each: int, threads: int) -> Engine:
    """Start an engine whose KV cache is `pool_bytes`, and which runs as many whole requests as fit in it."""
    each = kv_bytes_of(directory)
    blocks = pool_bytes // (each * BLOCK)
    concurrent = (blocks - 1) // blocks_each  # vLLM keeps one block for itself
    options = {"model": str(directory), "blocks": blocks, "max_num_seqs": concurrent, "max_model_len": 1152}
    return Engine(name, start_worker(__file__, options, threads), each, concurrent, {"blocks": blocks})


def wait(engine: Engine) -> None:
    """Wait until the engine has started."""
    wanted, engine.started = engine.started["blocks"], engine.answer()
    if engine.started["blocks"] != wanted:
        raise SystemExit(f"{engine.name}: asked for {wanted} KV blocks, got {engine.started['blocks']}")


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of paired repetitions."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(engines: list[Engine], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All loads on all engines, in turns; ratios are taken within a round."""
    prompt, new = options.prompt, options.new
    loads: dict[str, Any] = {
        "short": lambda e: (1, 128, 32),
        "long": lambda e: (1, 1024, 32),
        "prefill": lambda e: (1, prompt, 2),
        "step": lambda e: (e.concurrent, prompt, new // 2),
        "same_batch": lambda e: (engines[0].concurrent, prompt, new // 2),
        "kv_bound": lambda e: (options.requests, prompt, new),
    }
    found: dict[str, dict[str, list[dict[str, Any]]]] = {e.name: {name: [] for name in loads} for e in engines}
    for engine in engines:
        engine.run(2, 128, 8, seed=99)  # warm
    began = last = time.perf_counter()
    for round_ in range(options.rounds):
        now = time.perf_counter()
        if round_ and now - began + (now - last) > options.seconds:
            break
        last = now
        for name, load in loads.items():
            for engine in engines if round_ % 2 == 0 else engines[::-1]:
                found[engine.name][name].append(engine.run(*load(engine), seed=round_))
                print(round_, name, engine.name, f"{found[engine.name][name][-1]['seconds']:.2f} s", file=sys.stderr)
    return [row(engine, engines[0], found, options) for engine in engines]


def row(engine: Engine, dense: Engine, found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What is reported of one engine."""
    mine, theirs = found[engine.name], found[dense.name]

    def ratio(load: str, value: Any) -> dict[str, float]:
        return spread([value(b) / value(a) for a, b in zip(mine[load], theirs[load], strict=True)])

    def expected(who: Engine, loads: dict[str, Any]) -> float:
        prefill = statistics.median(one["ttft"][0] for one in loads["prefill"])
        step = statistics.median(one["itl"] for one in loads["step"])
        return options.requests * prefill + math.ceil(options.requests / who.concurrent) * options.new * step

    predicted = expected(dense, theirs) / expected(engine, mine)
    measured = ratio("kv_bound", lambda one: one["seconds"])
    return {
        "name": engine.name,
        "kv_bytes_per_token": engine.kv_bytes,
        "kv_pool_tokens": (engine.started["blocks"] - 1) * BLOCK,
        "requests_at_once": engine.concurrent,
        "start_seconds": round(engine.started["start_seconds"], 1),
        "ttft_seconds": {c: spread([one["ttft"][0] for one in mine[c]]) for c in ("short", "long")},
        "itl_seconds": {c: spread([one["itl"] for one in mine[c]]) for c in ("short", "long", "step")},
        "ttft_dense_over_this": {c: ratio(c, lambda one: one["ttft"][0]) for c in ("short", "long")},
        "itl_dense_over_this": {c: ratio(c, lambda one: one["itl"]) for c in ("short", "long")},
        "throughput_ratio_same_batch": ratio("same_batch", lambda one: one["seconds"]),
        "rounds": len(mine["kv_bound"]),
        "kv_bound": {
            "requests_per_second": spread([options.requests / one["seconds"] for one in mine["kv_bound"]]),
            "ratio_to_dense": measured,
            "predicted_seconds": expected(engine, mine),
            "seconds": spread([one["seconds"] for one in mine["kv_bound"]]),
            "predicted_ratio": predicted,
            "measured_over_predicted": measured["median"] / predicted,
            "limit": dense.kv_bytes / engine.kv_bytes,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="dense model")
    parser.add_argument("pruned", nargs="*", type=Path, help="checkpoints made from it")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=4, help="requests the dense model's KV cache holds")
    parser.add_argument("--requests", type=int, default=24, help="of the KV-bound load, all sent at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new round that would end after so many")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    from pruning.console import Reporter
    from pruning.models.finding import find_model

    directories = {"dense": find_model(options.model, Reporter()).directory}
    directories |= {path.name: path for path in options.pruned}
    blocks_each = -(-(options.prompt + options.new) // BLOCK)
    pool = (options.at_once * blocks_each + 1) * BLOCK * kv_bytes_of(directories["dense"])
    engines: list[Engine] = []
    try:
        for name, path in directories.items():
            engines.append(start(name, path, pool, blocks_each, options.threads))
            wait(engines[-1])
        rows = measure(engines, options)
    finally:
        for engine in engines:
            engine.process.kill()
    document = {
        "machine": machine(options.threads), "model": options.model, "dtype": "float32",
        "prompt": options.prompt, "new": options.new, "requests": options.requests,
        "kv_pool_bytes": pool, "rows": rows,
    }  # fmt: skip
    text = json.dumps(document, indent=1) + "\n"
    if options.output:
        options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
