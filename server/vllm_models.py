"""What the model classes take from vLLM beyond its model modules. Tested with vLLM 0.32."""

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm

__all__ = ["RMSNorm", "is_first_worker"]


def is_first_worker() -> bool:
    """Whether this process is the first of all tensor and pipeline ranks."""
    return get_pp_group().is_first_rank and get_tensor_model_parallel_rank() == 0
