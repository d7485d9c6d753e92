"""Run what must keep working in vLLM on a pruned model; print one JSON line. Started by `test_features.py`."""

import gc
import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

OPTIONS = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni", "max_model_len": 160}


def _int8(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if str(parameter.dtype) == "torch.int8"]


def _kv_tokens(llm) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def _close(llm) -> None:
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def _logprobs(output) -> dict:
    return {
        "tokens": list(output.outputs[0].token_ids),
        "prompt": [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry],
    }


def served(job: dict) -> dict:
    """Everything one engine can show: chunks of 32 prompt tokens, prefix cache, LoRA, structure, tasks."""
    llm = LLM(
        job["sharded"],
        max_num_batched_tokens=32,
        max_num_seqs=4,
        block_size=32,
        enable_prefix_caching=True,
        enable_lora=True,
        max_lora_rank=8,
        **OPTIONS,
    )
    result = {"tasks": list(llm.supported_tasks)}
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    for name in ("first", "second"):
        (output,) = llm.generate([{"prompt_token_ids": job["prompt"]}], greedy, use_tqdm=False)
        answer = output.outputs[0]
        result[name] = {
            "tokens": list(answer.token_ids),
            "top": [
                sorted((e.logprob for e in step.values()), reverse=True)[:3] for step in output.outputs[0].logprobs
            ],
            "cached": output.num_cached_tokens,
        }
    scored = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    adapter = LoRARequest("adapter", 1, job["adapter"])
    for name, request in (("plain", None), ("lora", adapter)):
        (output,) = llm.generate(
            [{"prompt_token_ids": job["prompt"]}], scored, lora_request=request, use_tqdm=False
        )  # fmt: skip
        result[name] = _logprobs(output)
    structure = StructuredOutputsParams(regex=job["regex"])
    shaped = SamplingParams(temperature=0, max_tokens=20, structured_outputs=structure)
    result["structured"] = llm.generate(["Say:"], shaped, use_tqdm=False)[0].outputs[0].text
    try:
        llm.embed(["Say:"], use_tqdm=False)
        result["embed"] = ""
    except ValueError as error:
        result["embed"] = str(error)
    _close(llm)
    return result


def quantised(job: dict) -> dict:
    """The INT8 checkpoint: what is resident, and log-probabilities of the prompt.

    vLLM's INT8 product for CPUs with AMX takes bfloat16 or half activations only.
    """
    llm = LLM(job["quantised"], skip_tokenizer_init=True, **(OPTIONS | {"dtype": "bfloat16"}))
    scored = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": job["prompt"]}], scored, use_tqdm=False)
    result = _logprobs(output) | {"int8": llm.apply_model(_int8)[0]}
    _close(llm)
    return result


def dummy(directory: str) -> int:
    """Tokens the KV cache holds, of a directory without weights."""
    llm = LLM(directory, load_format="dummy", skip_tokenizer_init=True, **OPTIONS)
    tokens = _kv_tokens(llm)
    _close(llm)
    return tokens


def main(job: dict) -> None:
    """All of it, in one process."""
    result = {"served": served(job), "quantised": quantised(job)}
    result["kv_tokens"] = {name: dummy(directory) for name, directory in job["dummies"].items()}
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
