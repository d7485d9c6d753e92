"""Ask vLLM without our plugin one question and print the answer as JSON. Started by `test_stock_vllm.py`."""

import json
import sys

from vllm import LLM, SamplingParams


def main(model: str, question: str) -> None:
    """Greedy answer, KV cache tokens, and which of our modules the process imported."""
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, trust_remote_code=True)
    chat = [{"role": "user", "content": question}]
    output = llm.chat(chat, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0]
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "answer": output.outputs[0].text,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "ours": [name for name in sys.modules if name.partition(".")[0] in ("pruning", "server")],
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
