"""vLLM on a dense model and on pruned ones, paired: engines live side by side and take turns, one busy at a time.

python benchmarks/serving.py smollm2-135m PRUNED... --output benchmarks/results/serving.json

The KV-bound load: every engine gets the same bytes of KV cache, few enough that the dense model cannot hold all
requests, and runs as many at once as fit in full. Beside what is measured stands what a model of two costs predicts:
    seconds = R * prefill(P) + ceil(R / B) * D * step(B)
with R requests of P prompt tokens that write D tokens each, B of them at once (they start and end together, so they go
in waves), and both costs measured on the same engine when it is not KV-bound. Where a prompt is longer than a step
reads, requests do not start together; `steps.py` then counts the steps.
The limit is the ratio of KV bytes per token, dense / pruned: reached when a step costs the same at any B.
With windows the bytes are those of a whole request, and `room.py` says how many fit.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine
from steps import Costs, Load
from worker import Worker, start_worker

MODEL_LENGTH = 1152  # tokens of the longest request, where no load is longer
CONTEXTS = {"short": 128, "long": 1024}  # of one request at a time


def worker(options: dict[str, Any]) -> None:
    """Serve one model to the parent: a workload a line in, its timings a line out."""
    began = time.perf_counter()
    out, sys.stdout = sys.stdout, sys.stderr
    from room import room
    from vllm import LLM, EngineArgs, SamplingParams

    settings = {
        "model": options["model"], "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
        "block_size": options["block"], "max_model_len": options["max_model_len"], "skip_tokenizer_init": True,
        "max_num_batched_tokens": options["chunk"], "disable_log_stats": True,
    }  # fmt: skip
    asked = room(EngineArgs(**settings).create_engine_config(), *(options[k] for k in ("layer", "pool", "tokens")))
    llm = LLM(**settings, num_gpu_blocks_override=asked.blocks, max_num_seqs=asked.concurrent)
    engine = llm.llm_engine
    got = room(engine.vllm_config, *(options[k] for k in ("layer", "pool", "tokens")))
    if got != asked or engine.vllm_config.cache_config.num_gpu_blocks != asked.blocks:
        raise SystemExit(f"asked for {asked}, got {got}, {engine.vllm_config.cache_config.num_gpu_blocks} blocks")
    print(json.dumps({"start_seconds": time.perf_counter() - began, **asdict(asked)}), file=out, flush=True)
    scheduler = engine.engine_core.engine_core.scheduler
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
        most = preempted = 0
        while engine.has_unfinished_requests():
            most = max(most, len(scheduler.running))
            preempted = max(preempted, sum(one.num_preemptions for one in scheduler.running))
            for output in engine.step():
                seen = times[output.request_id]
                seen += [time.perf_counter() - began] * (len(output.outputs[0].token_ids) - len(seen))
        seconds = time.perf_counter() - began
        gaps = [b - a for seen in times.values() for a, b in itertools.pairwise(seen)]
        result = {"seconds": seconds, "ttft": [seen[0] for seen in times.values()], "itl": statistics.median(gaps)}
        result |= {"at_once": most, "preempted": preempted}
        print(json.dumps(result), file=out, flush=True)


@dataclass
class Engine(Worker):
    """A worker process and what is known of its model."""

    started: dict[str, Any]  # of its Room, and the seconds until it was there

    @property
    def kv_bytes(self) -> int:
        return int(self.started["kv_bytes"])

    @property
    def concurrent(self) -> int:
        return int(self.started["concurrent"])

    def run(self, requests: int, prompt: int, new: int, seed: int) -> dict[str, Any]:
        """Send a workload and wait for its timings."""
        return self.ask({"requests": requests, "prompt": prompt, "new": new, "seed": seed})


def dense_layers(directory: Path) -> tuple[int, int]:
    """Attention layers of a dense model, and the KV cache bytes of one token in each, float32."""
    config = json.loads((directory / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"], 2 * config["num_key_value_heads"] * head * 4


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of paired repetitions."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(engines: list[Engine], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All loads on all engines, in turns; ratios are taken within a round."""
    prompt, new = options.prompt, options.new
    loads: dict[str, Any] = {
        **{name: lambda _, context=context: (1, context, 32) for name, context in options.contexts.items()},
        "prefill": lambda e: (1, prompt, 2),
        "step": lambda e: (e.concurrent, prompt, new // 2),
        "same_batch": lambda e: (engines[0].concurrent, prompt, new // 2),
        "kv_bound": lambda e: (options.requests, prompt, new),
    }
    if not options.same_batch:
        loads.pop("same_batch")
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
    contexts = list(options.contexts)

    def ratio(load: str, value: Any) -> dict[str, float]:
        return spread([value(b) / value(a) for a, b in zip(mine[load], theirs[load], strict=True)])

    def expected(who: Engine, loads: dict[str, Any]) -> float:
        prefill = statistics.median(one["ttft"][0] for one in loads["prefill"])
        if options.prompt > options.chunk:
            alone = statistics.median(one["itl"] for one in loads[contexts[-1]])
            taken = statistics.median(one["seconds"] for one in loads["step"])
            some = Load(who.concurrent, who.concurrent, options.prompt, options.new // 2, options.chunk)
            all_ = Load(options.requests, who.concurrent, options.prompt, options.new, options.chunk)
            return Costs.of(prefill, alone, some, taken).seconds(all_)
        step = statistics.median(one["itl"] for one in loads["step"])
        return options.requests * prefill + math.ceil(options.requests / who.concurrent) * options.new * step

    steady = ["step"] if options.prompt <= options.chunk else []  # else some are read in it while others write
    predicted = expected(dense, theirs) / expected(engine, mine)
    measured = ratio("kv_bound", lambda one: one["seconds"])
    found_row = {
        "name": engine.name,
        "kv_bytes_per_token": engine.kv_bytes,
        "kv_pool_tokens": engine.started["pool_tokens"],
        "requests_at_once": engine.concurrent,
        "start_seconds": round(engine.started["start_seconds"], 1),
        "ttft_seconds": {c: spread([one["ttft"][0] for one in mine[c]]) for c in contexts},
        "itl_seconds": {c: spread([one["itl"] for one in mine[c]]) for c in [*contexts, *steady]},
        "ttft_dense_over_this": {c: ratio(c, lambda one: one["ttft"][0]) for c in contexts},
        "itl_dense_over_this": {c: ratio(c, lambda one: one["itl"]) for c in contexts},
        **(
            {"throughput_ratio_same_batch": ratio("same_batch", lambda one: one["seconds"])}
            if options.same_batch
            else {}
        ),
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
    if options.contexts != CONTEXTS:
        found_row["cache"] = {k: engine.started[k] for k in ("limited", "window", "group_layers", "in_flight_tokens")}
        found_row["cache"] |= {k: max(one[k] for one in mine["kv_bound"]) for k in ("at_once", "preempted")}
    return found_row


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
    parser.add_argument("--contexts", type=int, nargs="+", help="of one request at a time [128 1024]")
    parser.add_argument("--same-batch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--block", type=int, default=128, help="tokens in a KV block")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of one step, at most")
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
    options.contexts = {str(c): c for c in options.contexts} if options.contexts else CONTEXTS
    tokens = options.prompt + options.new
    layers, layer = dense_layers(directories["dense"])
    pool = (options.at_once * -(-tokens // options.block) + 1) * options.block * layers * layer
    longest = max(MODEL_LENGTH, tokens, *(context + 32 for context in options.contexts.values()))
    fixed = {"pool": pool, "layer": layer, "tokens": tokens, "block": options.block, "chunk": options.chunk,
             "max_model_len": longest}  # fmt: skip
    engines: list[Engine] = []
    try:
        for name, path in directories.items():
            process = start_worker(__file__, {"model": str(path), **fixed}, options.threads)
            engines.append(Engine(name, process, {}))
            engines[-1].started = engines[-1].answer()
            print(name, engines[-1].started, file=sys.stderr)
        rows = measure(engines, options)
    finally:
        for engine in engines:
            engine.process.kill()
    document = {
        "machine": machine(options.threads), "model": options.model, "dtype": "float32",
        "prompt": options.prompt, "new": options.new, "requests": options.requests,
        "kv_pool_bytes": pool, "rows": rows,
    }  # fmt: skip
    if options.contexts != CONTEXTS:
        document |= {"block": options.block, "chunk": options.chunk}
    text = json.dumps(document, indent=1) + "\n"
    if options.output:
        options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
