"""Run vLLM on several checkpoints, one after another in one process; print JSON lines. Started by `test_vllm.py`."""

import gc
import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader import base_loader

OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}


def _projections(model) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith((".o_proj", ".down_proj", ".experts"))]


def _weigh_loaded(found: list[int]) -> None:
    """Note the bytes of each model's parameters when all are loaded, before vLLM packs them for the CPU."""
    pack = base_loader.process_weights_after_loading

    def weigh(model, *arguments) -> None:
        found.append(sum(parameter.nbytes for parameter in model.parameters()))
        pack(model, *arguments)

    base_loader.process_weights_after_loading = weigh


def main(job: dict) -> None:
    """Greedy tokens, prompt log-probabilities and the KV cache of every checkpoint in `job["models"]`."""
    weights: list[int] = []
    _weigh_loaded(weights)
    for model in job["models"]:
        options = OPTIONS | job["options"]
        llm = LLM(model, skip_tokenizer_init=True, disable_log_stats=True, **options)
        params = SamplingParams(
            temperature=0, max_tokens=job["max_tokens"], prompt_logprobs=0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        cache = llm.llm_engine.vllm_config.cache_config
        projections = llm.apply_model(_projections)[0]
        result = {
            "model": model,
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "prompt_logprobs": [
                [next(iter(entry.values())).logprob for entry in o.prompt_logprobs if entry] for o in outputs
            ],
            "projections": projections,
            "weight_bytes": weights[-1] if weights else None,  # of workers in this process
            "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        }
        print("RESULT " + json.dumps(result), flush=True)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
