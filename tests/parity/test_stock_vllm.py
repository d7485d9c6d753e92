"""Stock vLLM, without our plugin, serves what `--fuse --format nemotron-nas` writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REMOVED = (4, 6, 7, 8, 12, 17, 22, 25, 26, 29)  # what a greedy search chose on text of several domains
DENSE_TOKENS = 23_296  # of KV cache in 1 GiB, float32


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("stock") / "smollm2"
    keep = [str(block) for block in range(30) if block not in REMOVED]
    flags = ["--attention", "10", "--keep", *keep, "--importance", "random", "--fuse", "--format", "nemotron-nas"]
    tokens = ["--calibration-tokens", "4096", "--score-tokens", "256"]
    command = [Path(sys.executable).with_name("prune-export"), "smollm2-135m", "--output", directory, *flags, *tokens]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {
        "VLLM_PLUGINS": "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_MODULES_CACHE": str(directory.parent / "modules"),
    }
    command = [sys.executable, Path(__file__).with_name("stock.py"), directory, "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    return json.loads(line)


@pytest.mark.engine
def test_it_answers_with_a_third_of_the_attention_layers_gone(answered):
    assert "Paris" in answered["answer"]
    assert answered["ours"] == []


@pytest.mark.engine
def test_the_kv_cache_holds_half_as_many_tokens_again(answered):
    assert answered["kv_tokens"] * 20 == DENSE_TOKENS * 30
