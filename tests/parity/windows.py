"""Run vLLM on checkpoints with limited layers, one after another in one process; print JSON lines.

Started by `test_windows.py`.
"""

import gc
import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 448, "block_size": 32}


def _logprobs(output) -> dict:
    answer = output.outputs[0]
    return {
        "tokens": list(answer.token_ids),
        "prompt": [next(iter(entry.values())).logprob for entry in output.prompt_logprobs or [] if entry],
        "chosen": [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)],
        "cached": output.num_cached_tokens,
    }


def main(job: dict) -> None:
    """Of each checkpoint: one batch with prompt log-probabilities, then the same prompts again from the cache."""
    for model, max_tokens in job["models"].items():
        llm = LLM(model, skip_tokenizer_init=True, disable_log_stats=False, **(OPTIONS | job["options"]))
        fixed = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 0}
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        scored = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0, **fixed)
        adapter = LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None
        # vLLM 0.32 on a CPU computes log-probabilities of prompts for one request with an adapter at a time.
        parts = [prompts] if adapter is None else [[prompt] for prompt in prompts]
        answers = [o for part in parts for o in llm.generate(part, scored, use_tqdm=False, lora_request=adapter)]
        result = {"model": model, "first": [_logprobs(o) for o in answers]}
        if job["again"]:
            again = SamplingParams(max_tokens=job["again"], **fixed)
            result["second"] = [_logprobs(o) for o in llm.generate(prompts, again, use_tqdm=False)]
        cache = llm.llm_engine.vllm_config.cache_config
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        for name, key in (("accepted", "accepted"), ("guessed", "draft")):
            result[name] = counts.get(f"vllm:spec_decode_num_{key}_tokens")
        result["blocks"], result["tokens"] = cache.num_gpu_blocks, cache.kv_cache_size_tokens
        print("RESULT " + json.dumps(result), flush=True)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
