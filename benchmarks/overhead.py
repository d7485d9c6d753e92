"""What `prune-serve` costs over vLLM's own server: the same checkpoint and engine arguments, paired in one run.

Both servers run all the time; rounds of vLLM's serving benchmark go to one at a time, in the order A B B A, the two
rounds of a pair with the same prompts. Prompts differ between pairs, so no round finds its prefix cached.

    python benchmarks/overhead.py models/smollm2-135m-pruned --output benchmarks/results/overhead.json
"""

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import vllm
from vllm.benchmarks import serve as serving
from vllm.utils.argparse_utils import FlexibleArgumentParser

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"]
METRICS = {"output_throughput": "tokens per second", "mean_ttft_ms": "ms", "median_ttft_ms": "ms", "mean_itl_ms": "ms"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)


def wait(url: str, process: subprocess.Popen, log: Path) -> None:
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            if process.poll() is not None:
                sys.exit(log.read_text()[-3000:])
            time.sleep(1)


def measure(port: int, checkpoint: Path, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    parser = FlexibleArgumentParser()
    serving.add_cli_args(parser)
    args = parser.parse_args([
        "--backend", "openai", "--base-url", f"http://127.0.0.1:{port}", "--endpoint", "/v1/completions",
        "--model", checkpoint.name, "--tokenizer", str(checkpoint), "--dataset-name", "random",
        "--random-input-len", str(arguments.input), "--random-output-len", str(arguments.output_tokens),
        "--num-prompts", str(arguments.requests), "--max-concurrency", str(arguments.concurrency),
        "--ignore-eos", "--seed", str(seed), "--disable-tqdm", "--percentile-metrics", "ttft,itl",
    ])  # fmt: skip
    result = serving.main(args)
    assert result["completed"] == arguments.requests, result
    return {name: result[name] for name in METRICS}


def interval(ratios: list[float], draws: int = 10_000) -> list[float]:
    """95% interval of the geometric mean of ratios, by resampling pairs."""
    generator = random.Random(0)
    means = sorted(statistics.geometric_mean(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return [means[int(0.025 * draws)], means[int(0.975 * draws)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output-tokens", type=int, default=32)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint.resolve()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # One thread for each engine: the other core is for the API process and the client.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    ports = {"shoal": free_port(), "vllm": free_port()}
    commands = {
        "shoal": [str(Path(sys.executable).with_name("prune-serve")), str(checkpoint), "--port", str(ports["shoal"]),
                  "--", *ENGINE],
        "vllm": [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(checkpoint),
                 "--served-model-name", checkpoint.name, "--host", "127.0.0.1", "--port", str(ports["vllm"]), *ENGINE],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        logs = {name: Path(place, name) for name in commands}
        servers = {name: start(command, logs[name]) for name, command in commands.items()}
        try:
            for name, path in (("shoal", "/health/ready"), ("vllm", "/health")):
                wait(f"http://127.0.0.1:{ports[name]}{path}", servers[name], logs[name])
            for name in servers:  # the first round pays for what is done once
                measure(ports[name], checkpoint, arguments, seed=999)
            rounds: dict[str, list[dict[str, float]]] = {"shoal": [], "vllm": []}
            for pair in range(arguments.pairs):
                for name in ("shoal", "vllm") if pair % 2 == 0 else ("vllm", "shoal"):
                    rounds[name].append(measure(ports[name], checkpoint, arguments, seed=pair))
        finally:
            for server in servers.values():
                server.terminate()
            for server in servers.values():
                server.wait(60)
    ratios = {}
    for name, unit in METRICS.items():
        pairs = [ours[name] / stock[name] for ours, stock in zip(rounds["shoal"], rounds["vllm"], strict=True)]
        ratios[name] = {
            "unit": unit,
            "shoal": statistics.median(one[name] for one in rounds["shoal"]),
            "vllm": statistics.median(one[name] for one in rounds["vllm"]),
            "ratio": statistics.geometric_mean(pairs),
            "interval_95": interval(pairs),
        }
    setting = {key: value for key, value in vars(arguments).items() if key not in ("checkpoint", "output")}
    report = {
        "model": checkpoint.name, "vllm": vllm.__version__, "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "engine": ENGINE, "engine_threads": int(os.environ["OMP_NUM_THREADS"]),
        **setting, "ratios": ratios, "rounds": rounds,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in ratios.items():
        low, high = row["interval_95"]
        print(f"{name}: shoal {row['shoal']:.2f}, vllm {row['vllm']:.2f} {row['unit']}, "
              f"ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]")  # fmt: skip


if __name__ == "__main__":
    main()
