"""What Shoal takes from vLLM: every name, how it is called, and what is relied on inside it. Data alone.

    CONTRACT    # a `Taken` for each name; SEAMS of models.py and the imports of server/ are checked against it too

`tests/contract` reads vLLM's sources and compares: the installed version in the tests, a newer one by `make contract`.
A class that we derive from, and a function that we put another in the place of, has `exact` parameters.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Taken:
    """One name.

    Attributes:
        place: `module:name` or `module:Class.member`, below `vllm`.
        moved: The same where other versions keep it.
        positional: Arguments that we pass by position, `self` not counted; None: it is not called.
        keywords: Arguments that we pass by name.
        exact: All parameters, `self` not counted, of what we override or replace.
        looks_up: Names that its body looks up when it runs, because we replace what they mean; `a|b`: either.
    """

    place: str
    moved: str | None = None
    positional: int | None = None
    keywords: tuple[str, ...] = ()
    exact: tuple[str, ...] | None = None
    looks_up: tuple[str, ...] = ()


_LAUNCHERS, _UTILS, _PLANNING = "entrypoints.launchers", "v1.core.kv_cache_utils", "v1.core.kv_cache_planning"
_ATTENTION = (
    "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "use_alibi_sqrt", "cache_config", "quant_config",
    "logits_soft_cap", "per_layer_sliding_window", "prefix", "attn_type", "kv_sharing_target_layer_name",
)  # fmt: skip

CONTRACT: tuple[Taken, ...] = (
    # The server: arguments, application, processes.
    Taken(f"{_LAUNCHERS}.cli_args:make_arg_parser", "entrypoints.common.cli_args:make_arg_parser", 1),
    Taken(
        f"{_LAUNCHERS}.cli_args:validate_parsed_serve_args", "entrypoints.common.cli_args:validate_parsed_serve_args", 1
    ),
    Taken("entrypoints.serve.utils.api_utils:cli_env_setup", "entrypoints.common.startup:cli_env_setup", 0),
    Taken("utils.argparse_utils:FlexibleArgumentParser"),
    Taken(f"{_LAUNCHERS}.launcher:validate_api_server_args", None, 1),
    Taken(f"{_LAUNCHERS}.launcher:setup_server", None, 1, ("reuse_port",)),
    Taken(f"{_LAUNCHERS}.launcher:create_server_socket", None, 1, ("reuse_port",)),
    Taken(f"{_LAUNCHERS}.launcher:NoSignalServer.__init__", None, 1, ("peer_loads",)),
    Taken(f"{_LAUNCHERS}.api_server.entry:build_async_engine_client", None, 1, ("client_config",)),
    Taken(f"{_LAUNCHERS}.api_server.app_state:init_app_state", None, 4),
    Taken(f"{_LAUNCHERS}.app:build_app", None, 3),
    Taken(f"{_LAUNCHERS}.utils.ssl:SSLCertRefresher.__init__", None, 4),
    Taken(f"{_LAUNCHERS}.utils.ssl:SSLCertRefresher.stop", None, 0),
    Taken("logger:configure_logging_from_args", None, 1),
    Taken("utils.system_utils:decorate_logs", None, 0),
    Taken("utils.system_utils:set_process_title", None, 2),
    Taken("platforms:current_platform"),
    Taken("platforms.interface:Platform.is_cpu", None, 0),
    Taken("platforms.interface:Platform.is_cuda", None, 0),
    Taken("third_party:pynvml"),
    Taken("envs:VLLM_HTTP_TIMEOUT_KEEP_ALIVE"),
    Taken("envs:VLLM_ENABLE_RESPONSES_API_STORE"),
    Taken("envs:VLLM_PROCESS_NAME_PREFIX"),
    Taken("v1.metrics.prometheus:get_prometheus_registry", None, 0),
    Taken("v1.engine.exceptions:EngineDeadError"),
    Taken("exceptions:GracefulHTTPError.__init__", None, 2),
    Taken("exceptions:VLLMValidationError.__init__", None, 1, ("parameter",)),
    Taken("entrypoints.cli.serve:run_multi_api_server", None, 1),
    Taken("v1.utils:run_api_server_worker_proc"),
    Taken("v1.utils:APIServerProcessManager.__init__", looks_up=("run_api_server_worker_proc",)),
    # The engine client.
    Taken(":SamplingParams"),
    Taken("v1.engine.async_llm:AsyncLLM.generate", None, 3),
    Taken("v1.engine.async_llm:AsyncLLM.errored"),
    Taken("v1.engine.async_llm:AsyncLLM.check_health", None, 0),
    Taken("v1.engine.async_llm:AsyncLLM.get_supported_tasks", None, 0),
    Taken("v1.engine.async_llm:AsyncLLM.shutdown", None, 0, ("timeout",)),
    Taken("v1.engine.async_llm:AsyncLLM.model_config"),
    Taken("v1.engine.async_llm:AsyncLLM.vllm_config"),
    Taken("v1.engine.async_llm:AsyncLLM.engine_core"),
    Taken("v1.engine.core_client:MPClient.resources"),
    Taken("v1.engine.core_client:AsyncMPClient.outputs_queue"),
    Taken("v1.engine.core_client:BackgroundResources.engine_dead"),
    Taken("sampling_params:SamplingParams.clone", None, 0),
    Taken("sampling_params:SamplingParams.max_tokens"),
    Taken("sampling_params:SamplingParams.min_tokens"),
    Taken("sampling_params:SamplingParams.structured_outputs"),
    Taken("sampling_params:SamplingParams.n"),
    # The configuration.
    Taken("config:get_current_vllm_config", None, 0),
    Taken("config:get_layers_from_vllm_config", None, 3),
    Taken("config.vllm:VllmConfig.model_config"),
    Taken("config.vllm:VllmConfig.cache_config"),
    Taken("config.vllm:VllmConfig.parallel_config"),
    Taken("config.vllm:VllmConfig.scheduler_config"),
    Taken("config.vllm:VllmConfig.speculative_config"),
    Taken("config.vllm:VllmConfig.load_config"),
    Taken("config.vllm:VllmConfig.max_in_flight_tokens"),
    Taken("config.cache:CacheConfig.kv_cache_size_tokens"),
    Taken("config.cache:CacheConfig.num_gpu_blocks"),
    Taken("config.cache:CacheConfig.block_size"),
    Taken("config.cache:CacheConfig.cache_dtype"),
    Taken("config.cache:CacheConfig.sliding_window"),
    Taken("config.scheduler:SchedulerConfig.max_num_seqs"),
    Taken("config.scheduler:SchedulerConfig.max_num_batched_tokens"),
    Taken("config.scheduler:SchedulerConfig.disable_hybrid_kv_cache_manager"),
    Taken("config.parallel:ParallelConfig.data_parallel_size"),
    Taken("config.speculative:SpeculativeConfig.method"),
    Taken("config.speculative:SpeculativeConfig.draft_model_config"),
    Taken("config.load:LoadConfig.load_format"),
    Taken("config.model:ModelConfig.model"),
    Taken("config.model:ModelConfig.hf_config"),
    Taken("config.model:ModelConfig.hf_text_config"),
    Taken("config.model:ModelConfig.max_model_len"),
    Taken("config.model:ModelConfig.enforce_eager"),
    Taken("config.model:ModelConfig.use_mla"),
    Taken("config.model:ModelConfig.get_head_size", None, 0),
    Taken("config.model:ModelConfig.get_total_num_kv_heads", None, 0),
    Taken("config.model:ModelConfig.get_num_kv_heads", None, 1),
    Taken("config.model:ModelConfig.get_num_attention_heads", None, 1),
    # Ranks.
    Taken("distributed:get_pp_group", None, 0),
    Taken("distributed:get_tensor_model_parallel_rank", None, 0),
    Taken("distributed:get_tensor_model_parallel_world_size", None, 0),
    Taken("distributed:tensor_model_parallel_all_reduce", None, 1),
    Taken("distributed.parallel_state:GroupCoordinator.is_first_rank"),
    Taken("distributed.parallel_state:GroupCoordinator.rank_in_group"),
    Taken("distributed.parallel_state:GroupCoordinator.world_size"),
    # Layers.
    Taken("model_executor.layers.attention:Attention"),
    Taken(
        "model_executor.layers.attention.attention:Attention.__init__",
        None,
        3,
        _ATTENTION[3:4] + _ATTENTION[6:7] + ("per_layer_sliding_window", "prefix", "kv_sharing_target_layer_name"),
    ),
    Taken("model_executor.layers.attention.attention:Attention.forward", None, 3),
    *(
        Taken(f"model_executor.layers.attention.attention:Attention.{name}")
        for name in ("num_heads", "num_kv_heads", "head_size", "impl", "layer_name", "sliding_window")
    ),
    Taken("model_executor.layers.layernorm:RMSNorm.__init__", None, 1, ("eps", "has_weight")),
    Taken("model_executor.layers.linear:ColumnParallelLinear.__init__", None, 2, ("bias",)),
    Taken("model_executor.layers.linear:RowParallelLinear.__init__", None, 2, ("bias",)),
    # Models; the classes of each family are SEAMS of models.py.
    Taken(":ModelRegistry"),
    Taken("model_executor.models.registry:_ModelRegistry.get_supported_archs", None, 0),
    Taken("model_executor.models.registry:_ModelRegistry.register_model", None, 2),
    Taken("model_executor.models.utils:make_layers", exact=("num_hidden_layers", "layer_fn", "prefix")),
    Taken("model_executor.models.llama:LlamaDecoderLayer.__init__", None, 2, ("attn_layer_type",)),
    Taken("model_executor.models.llama:LlamaForCausalLM.__init__", None, 0, ("vllm_config", "prefix", "layer_type")),
    Taken("model_executor.models.transformers:TransformersForCausalLM"),
    Taken("model_executor.models.transformers.base:get_pp_indices", exact=("num_hidden_layers", "pp_rank", "pp_size")),
    Taken("model_executor.models.transformers.base:Base.pipeline_parallel", exact=()),
    Taken("model_executor.models.transformers.base:Base._get_attn_cls", exact=()),
    Taken(
        "model_executor.models.transformers.base:Base._create_attention_instances",
        exact=("prefix",),
        looks_up=("get_pp_indices|_pp_indices", "_get_attn_cls"),
    ),
    # The KV cache.
    Taken(
        f"{_UTILS}:get_kv_cache_groups",
        f"{_PLANNING}:get_kv_cache_groups",
        exact=("vllm_config", "kv_cache_spec"),
        looks_up=("_get_kv_cache_groups_uniform_page_size", "_get_packed_kv_cache_groups"),
    ),
    Taken(
        f"{_UTILS}:_get_kv_cache_groups_uniform_page_size",
        f"{_PLANNING}:_get_kv_cache_groups_uniform_page_size",
        exact=("kv_cache_spec",),
    ),
    Taken(
        f"{_UTILS}:_get_packed_kv_cache_groups",
        f"{_PLANNING}:_get_packed_kv_cache_groups",
        exact=("vllm_config", "kv_cache_spec"),
    ),
    Taken(
        f"{_UTILS}:_project_kv_cache_groups_to_worker",
        f"{_PLANNING}:_project_kv_cache_groups_to_worker",
        exact=("global_kv_cache_groups", "worker_spec"),
    ),
    Taken(f"{_UTILS}:_promote_local_kv_cache_specs", f"{_PLANNING}:_promote_local_kv_cache_specs", 1),
    Taken(
        f"{_UTILS}:get_kv_cache_configs",
        f"{_PLANNING}:get_kv_cache_configs",
        looks_up=("_project_kv_cache_groups_to_worker",),
    ),
    Taken(
        f"{_UTILS}:get_kv_cache_configs",
        f"{_PLANNING}:DefaultKVCacheConfigBuilder.get_kv_cache_groups",
        looks_up=("get_kv_cache_groups",),
    ),
    Taken(
        "v1.attention.backends.utils:resolve_kv_cache_layout",
        exact=("vllm_config", "supported_layouts", "kv_cache_specs"),
    ),
    Taken("v1.engine.core:resolve_kv_cache_layout"),
    Taken("v1.kv_cache_layout:KVCacheLayout.BLHNC"),
    Taken("v1.kv_cache_layout:KVCacheLayout.BLNHC"),
    Taken("v1.kv_cache_layout:KVCacheLayout.LBHNC"),
    Taken("v1.kv_cache_layout:KVCacheLayout.is_block_outermost"),
    Taken("v1.kv_cache_interface:KVCacheGroupSpec.layer_names"),
    Taken("v1.kv_cache_interface:KVCacheGroupSpec.kv_cache_spec"),
    Taken("v1.kv_cache_interface:KVCacheSpec.page_size_bytes"),
    Taken("v1.kv_cache_interface:KVCacheSpec.max_memory_usage_bytes", None, 1),
    Taken("v1.kv_cache_interface:KVCacheSpec.merge", None, 1),
    Taken("v1.kv_cache_interface:AttentionSpec.num_kv_heads"),
    Taken("v1.kv_cache_interface:UniformTypeKVCacheSpecs.is_uniform_type", None, 1),
    Taken("v1.kv_cache_interface:UniformTypeKVCacheSpecs.from_specs", None, 1),
    Taken("v1.kv_cache_interface:UniformTypeKVCacheSpecs.kv_cache_specs"),
    # Drafts and grammars.
    Taken(
        "v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.initialize_attn_backend",
        exact=("kv_cache_config", "kernel_block_sizes"),
    ),
    Taken("v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.draft_attn_groups"),
    *(
        Taken(f"v1.worker.utils:AttentionGroup.{name}")
        for name in ("backend", "layer_names", "kv_cache_spec", "kv_cache_group_id")
    ),
    Taken("v1.worker.utils:AttentionGroup.create_metadata_builders", None, 2, ("kernel_block_size",)),
    Taken("v1.structured_output:StructuredOutputManager.grammar_init", exact=("request",)),
    Taken("v1.structured_output.request:StructuredOutputRequest._grammar"),
    Taken("v1.structured_output.request:StructuredOutputRequest.grammar"),
)
