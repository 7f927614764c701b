"""The table of vLLM's symbols that we rely on, with the parameters and attributes of each."""

from flora_vllm.plugin.hook import Hook
from flora_vllm.plugin.metrics_hooks import METRICS_HOOKS
from flora_vllm.plugin.scheduler_hooks import SCHEDULER_HOOKS
from flora_vllm.plugin.serving_hooks import SERVING_HOOKS
from flora_vllm.plugin.tower_hooks import TOWER_HOOKS

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_MIXIN = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"
_WORKER = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
_MANAGER = "vllm.lora.model_manager:LRUCacheLoRAModelManager"
_LINEAR = "vllm.model_executor.layers.linear"
_MIXTURE = "vllm.model_executor.layers.fused_moe"
_UNQUANTISED = f"{_MIXTURE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"
_SWIGLU = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
_MIXTURE_SIZES = (
    "moe_parallel_config", "hidden_dim_unpadded", "experts_per_token", "intermediate_size",
    "intermediate_size_per_partition_unpadded",
)  # fmt: skip
_MIXTURE_RANKS = ("tp_size", "tp_rank", "dp_size", "ep_size", "pcp_size", "sp_size", "enable_eplb")
_CACHE = "vllm.utils.cache:LRUCache"
_SHARED = "vllm.distributed.device_communicators.shm_broadcast:SpinCondition"
_SERVING = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"
_SYNC = "vllm.v1.engine.llm_engine:LLMEngine"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager"
_WRAPPER = "vllm.compilation.cuda_graph:CUDAGraphWrapper"
_ADMISSION = f"{_SERVING}.admit_lora"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SPEECH = "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing"
_ENGINE = "vllm.v1.engine.core:EngineCore"
_KEYS = "vllm.v1.core.kv_cache_utils"
_ORDERED = "vllm.v1.worker.utils:encoder_inputs_in_batch_order"

_CONFIG = (
    Hook(f"{_ARGS}.add_cli_args", ("parser",)),
    Hook(f"{_ARGS}.from_cli_args", ("args",)),
    Hook(f"{_ARGS}.create_engine_config", ("self",)),
    Hook(f"{_ARGS}.additional_config"),
    Hook(f"{_ARGS}.enable_lora"),
    Hook("vllm.envs:VLLM_USE_RUST_FRONTEND"),
    Hook("vllm.config:VllmConfig.additional_config"),
    Hook("vllm.config:VllmConfig.lora_config"),
    Hook("vllm.config:VllmConfig.parallel_config"),
    Hook("vllm.config:VllmConfig.model_config"),
    Hook("vllm.config:ModelConfig.is_encoder_decoder"),
    Hook("vllm.config.lora:LoRAConfig.fully_sharded_loras"),
    Hook("vllm.config.lora:LoRAConfig.max_lora_rank"),
    Hook("vllm.config.lora:MaxLoRARanks"),
    Hook("vllm.config:get_current_vllm_config_or_none", ()),
    Hook("vllm.platforms.interface:Platform.device_type"),
    Hook("vllm.platforms.cpu:CpuPlatform.check_and_update_config", ("vllm_config",), "cpu"),
)
_WORKER_SIDE = (
    Hook(
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        unless="vllm.lora.worker_manager:set_worker_lora_manager_factory",
    ),
    Hook(f"{_MIXIN}.load_lora_model", ("self", "model", "vllm_config", "device"), sets=("lora_manager",)),
    Hook(f"{_MIXIN}.add_lora", ("self", "lora_request")),
    Hook(f"{_MIXIN}.remove_lora", ("self", "lora_id")),
    Hook(f"{_WORKER}.__init__", ("self", "vllm_config", "device"), sets=("lora_config",)),
    Hook(f"{_WORKER}._manager_cls"),
    Hook(f"{_WORKER}.create_lora_manager", ("self", "model", "vllm_config"), sets=("_adapter_manager",)),
    Hook(f"{_WORKER}._load_adapter", ("self", "lora_request")),
    Hook(f"{_WORKER}._apply_adapters", ("self", "lora_requests")),
    Hook(f"{_WORKER}.add_adapter", ("self", "lora_request")),
    Hook(f"{_WORKER}.remove_adapter", ("self", "adapter_id")),
    Hook(f"{_WORKER}.set_active_adapters", ("self", "requests", "mapping")),
    Hook(f"{_WORKER}.add_dummy_lora", ("self", "lora_request", "rank")),
    Hook(f"{_WORKER}.get_dummy_lora_warmup_rank", ("self", "default_rank")),
    Hook(
        f"{_MANAGER}.__init__",
        ("self", "model", "max_num_seqs", "max_num_batched_tokens", "lora_config", "device", "vllm_config"),
        sets=(
            "model",
            "device",
            "lora_config",
            "_registered_adapters",
            "_active_adapters",
            "lora_index_to_id",
            "packed_modules_mapping",
        ),
    ),
    Hook(f"{_MANAGER}._create_lora_modules", ("self",)),
    Hook(
        f"{_MANAGER}._init_punica_wrapper",
        ("self", "max_num_batched_tokens", "vllm_config"),
        sets=("supports_mm", "punica_wrapper_mapping"),
    ),
    Hook(f"{_MANAGER}._match_target_modules", ("self", "module_name")),
    Hook(f"{_MANAGER}.capacity"),
    Hook(f"{_MANAGER}.lora_slots"),
    Hook(f"{_MANAGER}.__len__", ("self",)),
    Hook(f"{_MANAGER}.get_adapter", ("self", "adapter_id")),
    Hook(f"{_MANAGER}.add_adapter", ("self", "lora")),
    Hook(f"{_MANAGER}.remove_adapter", ("self", "adapter_id")),
    Hook(f"{_MANAGER}.remove_oldest_adapter", ("self",)),
    Hook(f"{_MANAGER}.activate_adapter", ("self", "lora_id")),
    Hook(f"{_MANAGER}._deactivate_adapter", ("self", "lora_id")),
    Hook(f"{_MANAGER}._add_adapter", ("self", "lora")),
    Hook(f"{_MANAGER}.set_adapter_mapping", ("self", "mapping")),
    Hook(f"{_MANAGER}._set_adapter_mapping", ("self", "mapping")),
    Hook(f"{_MANAGER}.remove_all_adapters", ("self",)),
    Hook(f"{_MANAGER}.create_dummy_lora", ("self", "lora_id", "rank", "embedding_modules")),
    Hook(f"{_CACHE}.cache"),
    Hook(f"{_CACHE}.order"),
    Hook(f"{_CACHE}.__init__", ("self",), sets=("pinned_items",)),
    Hook(f"{_CACHE}.touch", ("self", "key")),
    Hook(f"{_CACHE}.remove_oldest", ("self",)),
    Hook(f"{_CACHE}._on_remove", ("self", "key", "value")),
    Hook("vllm.lora.layers:LoRAMapping.index_mapping"),
    Hook("vllm.lora.layers:LoRAMapping.type"),
    Hook("vllm.lora.layers:LoRAMappingType.LANGUAGE"),
    Hook("vllm.lora.utils:get_adapter_absolute_path", ("lora_path",)),
    Hook("vllm.lora.request:LoRARequest.lora_name"),
    Hook("vllm.lora.request:LoRARequest.name"),
    Hook("vllm.lora.request:LoRARequest.lora_int_id"),
    Hook("vllm.lora.request:LoRARequest.lora_path"),
    Hook("vllm.lora.request:LoRARequest.base_model_name"),
    Hook("vllm.lora.request:LoRARequest.load_inplace"),
    Hook("vllm.model_executor.models.utils:WeightsMapper._map_name", ("self", "key")),
    Hook("vllm.model_executor.models.utils:WeightsMapper._map_name_with_shard", ("self", "key")),
    Hook("vllm.model_executor.models.utils:WeightsMapper.orig_to_new_stacked"),
    Hook("vllm.model_executor.models.utils:WeightsMapper.orig_to_new_substr"),
    Hook("vllm.forward_context:set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "skip_compiled")),
    Hook("vllm.distributed.parallel_state:get_pp_group", ()),
    Hook("vllm.distributed.parallel_state:get_tp_group", ()),
    Hook("vllm.distributed.parallel_state:get_tensor_model_parallel_world_size", ()),
    Hook("vllm.distributed.communication_op:tensor_model_parallel_all_reduce", ("input_",)),
    Hook("vllm.config:ModelConfig.uses_mrope"),
    Hook("vllm.config:ModelConfig.hf_text_config"),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.language_model"),
    Hook("vllm.model_executor.models.interfaces:SupportsLoRA.packed_modules_mapping"),
    Hook("vllm.model_executor.models.interfaces:SupportsLoRA.lora_skip_prefixes"),
)
_LAYERS = (
    Hook("vllm.model_executor.models.utils:PPMissingLayer"),
    Hook(
        f"{_LINEAR}:LinearBase.__init__",
        ("self", "input_size", "output_size", "skip_bias_add", "params_dtype", "quant_config"),
        sets=("input_size", "output_size", "skip_bias_add", "params_dtype", "quant_method", "tp_rank"),
    ),
    Hook(
        f"{_LINEAR}:ColumnParallelLinear.__init__",
        ("self", "input_size", "output_size", "bias"),
        sets=("output_partition_sizes", "bias"),
    ),
    Hook(f"{_LINEAR}:MergedColumnParallelLinear.__init__", ("self", "output_sizes"), sets=("output_sizes",)),
    Hook(
        f"{_LINEAR}:QKVParallelLinear.__init__",
        ("self", "head_size", "total_num_heads", "total_num_kv_heads"),
        sets=("head_size", "total_num_heads", "total_num_kv_heads", "v_head_size", "num_kv_head_replicas"),
    ),
    Hook(
        f"{_LINEAR}:RowParallelLinear.__init__",
        ("self", "input_size", "output_size", "input_is_parallel"),
        sets=("input_size_per_partition", "output_partition_sizes", "input_is_parallel", "bias", "reduce_results"),
    ),
    Hook(f"{_LINEAR}:ReplicatedLinear.__init__", ("self", "input_size"), sets=("output_partition_sizes", "bias")),
    Hook(f"{_LINEAR}:LinearMethodBase.apply", ("self", "layer", "x", "bias")),
    Hook(f"{_LINEAR}:UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    Hook(f"{_LINEAR}:UnquantizedLinearMethod.process_weights_after_loading", ("self", "layer")),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.__init__",
        ("self", "num_embeddings", "embedding_dim"),
        sets=(
            "embedding_dim",
            "num_added_embeddings",
            "num_embeddings_per_partition",
            "org_vocab_size",
            "params_dtype",
            "quant_method",
            "shard_indices",
            "tp_size",
        ),
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.embedding",
        ("self", "layer", "input_"),
    ),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead"),
    Hook("vllm.config:ModelConfig.enable_prompt_embeds"),
    Hook("vllm.lora.layers:LoRAMapping.prompt_mapping"),
    Hook("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"),
    Hook("vllm.model_executor.layers.attention.mla_attention:MLAAttention.__init__", ("self",), sets=("kv_b_proj",)),
    Hook("vllm.model_executor.layers.fused_moe:MoERunner"),
    Hook("vllm.model_executor.layers.fused_moe.layer:FusedMoEConfig"),
    Hook("vllm.model_executor.layers.fused_moe.config:FusedMoEConfig.is_lora_enabled"),
    Hook(f"{_MIXTURE}.runner.moe_runner:MoERunner.__init__", ("self", "routed_experts"), sets=("routed_experts",)),
    Hook(
        f"{_MIXTURE}.routed_experts:RoutedExperts.__init__",
        ("self", "moe_config", "apply_router_weight_on_input"),
        sets=(
            "moe_config",
            "params_dtype",
            "activation",
            "ckpt_gate_proj_name",
            "ckpt_up_proj_name",
            "ckpt_down_proj_name",
            "global_num_experts",
            "apply_router_weight_on_input",
            "quant_method",
            *_SWIGLU,
        ),
    ),
    Hook(f"{_MIXTURE}.routed_experts:RoutedExperts.expert_map"),
    Hook(f"{_MIXTURE}.activation:MoEActivation"),
    Hook(
        f"{_UNQUANTISED}.apply",
        ("self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    ),
    Hook(f"{_UNQUANTISED}.create_weights", ("self", "layer", "num_experts")),
    Hook(f"{_MIXTURE}.fused_moe_method_base:FusedMoEMethodBase.__init__", ("self",), sets=("moe_kernel",)),
    Hook(f"{_MIXTURE}.fused_moe_method_base:FusedMoEMethodBase.is_monolithic"),
    Hook(f"{_MIXTURE}.experts.triton_moe:TritonExperts", device="cuda"),
    Hook(f"{_MIXTURE}.fused_moe_method_base:FusedMoEMethodBase.mk_can_overlap_shared_experts"),
    *(Hook(f"{_MIXTURE}.config:FusedMoEConfig.{name}") for name in _MIXTURE_SIZES),
    *(Hook(f"{_MIXTURE}.config:FusedMoEParallelConfig.{name}") for name in _MIXTURE_RANKS),
    Hook(f"{_MIXTURE}.experts.cpu_moe:CPUUnquantizedExperts.isa", device="cpu"),
    Hook(f"{_MIXTURE}.experts.cpu_moe:CPUUnquantizedExperts.__init__", ("self",), "cpu", sets=("_use_zentorch",)),
    Hook("vllm._custom_ops:cpu_prepack_moe_weight", ("weight", "isa"), "cpu"),
    Hook("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"), "cpu"),
    Hook("vllm.model_executor.layers.utils:cpu_unquantized_gemm", ("layer", "x", "weight", "bias"), "cpu"),
    Hook("vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch", ("self", "num_tokens"), "cuda"),
    Hook(f"{_GRAPHS}.dispatch", ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"), "cuda"),
    Hook(f"{_GRAPHS}.__init__", ("self",), "cuda", sets=("_graphs_captured",)),
    Hook(f"{_GRAPHS}.run_fullgraph", ("self", "desc"), "cuda"),
    Hook("vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor.num_tokens", None, "cuda"),
    Hook("vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor.num_active_loras", None, "cuda"),
    Hook(f"{_WRAPPER}.__call__", ("self",), "cuda"),
    Hook(f"{_WRAPPER}.__init__", ("self",), "cuda", sets=("runtime_mode", "concrete_cudagraph_entries")),
    Hook("vllm.compilation.cuda_graph:CUDAGraphEntry.cudagraph", None, "cuda"),
    Hook("vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled", (), "cuda"),
    Hook("vllm.forward_context:is_forward_context_available", (), "cuda"),
    Hook("vllm.forward_context:get_forward_context", (), "cuda"),
    Hook("vllm.forward_context:ForwardContext.cudagraph_runtime_mode", None, "cuda"),
    Hook("vllm.forward_context:ForwardContext.batch_descriptor", None, "cuda"),
    Hook("vllm.forward_context:BatchDescriptor.num_tokens", None, "cuda"),
    Hook("vllm.forward_context:BatchDescriptor.num_active_loras", None, "cuda"),
    Hook("vllm.config:CUDAGraphMode.NONE", None, "cuda"),
    Hook("vllm.config:CompilationConfig.cudagraph_mode", None, "cuda"),
    Hook("vllm.config:CompilationConfig.max_cudagraph_capture_size"),
    Hook("vllm.config:VllmConfig.compilation_config"),
    Hook("vllm.config:VllmConfig.speculative_config"),
    Hook("vllm.config:SpeculativeConfig.method"),
    Hook("vllm.config:ParallelConfig.data_parallel_size"),
    Hook("vllm.config:ParallelConfig.pipeline_parallel_size"),
    Hook("vllm.config:ParallelConfig.use_ubatching", None, "cuda"),
)
_ENGINES = (
    Hook(f"{_ASYNC}.add_request", ("self", "request_id", "prompt", "params", "lora_request")),
    Hook(f"{_ASYNC}.add_lora", ("self", "lora_request")),
    Hook(f"{_ASYNC}.remove_lora", ("self", "lora_id")),
    Hook(f"{_ASYNC}.sleep", ("self", "level")),
    Hook(f"{_SYNC}.sleep", ("self", "level")),
    Hook(f"{_ASYNC}.__init__", ("self", "vllm_config"), sets=("vllm_config", "output_processor", "engine_core")),
    Hook("vllm.v1.engine.core_client:AsyncMPClient.call_utility_async", ("self", "method")),
    Hook(f"{_SYNC}.add_request", ("self", "request_id", "prompt", "params", "lora_request")),
    Hook(f"{_SYNC}.add_lora", ("self", "lora_request")),
    Hook(f"{_SYNC}.remove_lora", ("self", "lora_id")),
    Hook(f"{_SYNC}.__init__", ("self", "vllm_config"), sets=("vllm_config",)),
    Hook("vllm.v1.engine:EngineCoreRequest.lora_request"),
    Hook("vllm.entrypoints.llm:LLM._run_engine", ("self",)),
    Hook("vllm.entrypoints.llm:LLM._run_tiling_engine", ("self",)),
    Hook("vllm.v1.engine:EngineCoreOutput.stop_reason"),
    Hook("vllm.v1.engine:EngineCoreOutput.pooling_output"),
    Hook("vllm.v1.engine:EngineCoreOutputs.outputs"),
    Hook("vllm.v1.worker.gpu_worker:Worker.execute_model", ("self", "scheduler_output")),
    Hook("vllm.v1.worker.gpu_worker:Worker.sample_tokens", ("self",)),
    Hook("vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch", ("self",)),
    Hook("vllm.v1.worker.gpu_worker:Worker.add_lora", ("self", "lora_request")),
    Hook("vllm.v1.worker.gpu_worker:Worker.pin_lora", ("self", "lora_id")),
    Hook("vllm.v1.worker.gpu_worker:Worker.reload_weights", ("self",)),
    Hook("vllm.v1.worker.gpu_worker:Worker.start_weight_update", ("self",)),
    Hook("vllm.v1.worker.gpu_worker:Worker.get_model", ("self",)),
    Hook("vllm.v1.worker.worker_base:WorkerBase.__init__", ("self",), sets=("vllm_config", "parallel_config")),
    Hook("vllm.v1.executor.abstract:Executor.add_lora", ("self", "lora_request")),
    Hook("vllm.v1.executor.abstract:Executor.remove_lora", ("self", "lora_id")),
    Hook("vllm.v1.executor.abstract:Executor.pin_lora", ("self", "lora_id")),
    Hook("vllm.v1.executor.abstract:Executor.__init__", ("self", "vllm_config"), sets=("sleeping_tags",)),
    Hook("vllm.v1.executor.abstract:Executor.collective_rpc", ("self", "method", "timeout", "args")),
    Hook(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc", ("self", "method", "args", "non_block")
    ),
    Hook("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", ("self",)),
    Hook(f"{_SHARED}.__init__", ("self",), sets=("busy_loop_s",)),
    Hook(f"{_SHARED}.wait", ("self", "timeout_ms")),
)
_SERVER = (
    *SERVING_HOOKS,
    Hook(
        f"{_SERVING}.__init__",
        ("self", "engine_client"),
        sets=(
            "engine_client",
            "lora_requests",
            "lora_id_counter",
            "lora_resolvers",
            "lora_resolver_lock",
            "model_config",
            "static_lora_modules",
        ),
    ),
    Hook("vllm.config:ParallelConfig._api_process_count"),
    Hook("vllm.config:ParallelConfig._api_process_rank"),
    Hook(f"{_SERVING}.load_lora_adapter", ("self", "request", "base_model_name")),
    Hook(f"{_SERVING}.unload_lora_adapter", ("self", "request")),
    Hook(f"{_SERVING}.resolve_lora", ("self", "lora_name")),
    Hook(f"{_SERVING}.model_name", ("self", "lora_request")),
    Hook(f"{_SERVING}.is_base_model", ("self", "model_name")),
    Hook(f"{_SERVING}.show_available_models", ("self",)),
    Hook(f"{_SERVING}.init_static_loras", ("self",)),
    Hook(f"{_SERVING}._check_load_lora_adapter_request", ("self", "request"), unless=_ADMISSION),
    Hook(f"{_SERVING}._check_unload_lora_adapter_request", ("self", "request")),
    Hook(
        "vllm.entrypoints.openai.models.serving:create_error_response",
        ("message", "err_type", "status_code"),
    ),
    Hook("vllm.entrypoints.serve.lora.api_router:LoadLoRAAdapterRequest"),
    Hook("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("self", "request")),
    Hook("vllm.entrypoints.serve.engine.serving:BaseServing._is_model_supported", ("self", "model_name")),
    Hook("vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model", ("self", "request")),
    Hook("vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest.lora_name"),
    Hook("vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest.lora_path"),
    Hook("vllm.entrypoints.serve.lora.protocol:UnloadLoRAAdapterRequest.lora_name"),
    Hook("vllm.entrypoints.openai.models.protocol:LoRAModulePath.path"),
    Hook("vllm.entrypoints.launchers.api_server.entry:build_and_serve", ("engine_client",)),
    Hook(f"{_ASYNC}.shutdown"),
    Hook(f"{_ASYNC}.errored"),
    Hook("vllm.entrypoints.launchers.app:init_entrypoints_middleware", ("args", "app", "supported_tasks")),
    Hook("vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware"),
    Hook("vllm.entrypoints.serve.exception_handling.error_response:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.exception_handling.handlers.http:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.exception_handling.handlers.validation:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.exception_handling.handlers.validation:clean_loc_for_param", ("loc",)),
    Hook("vllm.entrypoints.speech_to_text.realtime.connection:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.lora.api_router:attach_router", ("app",)),
    Hook("vllm.envs:VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    Hook("vllm.utils.counter:AtomicCounter.inc", ("self", "num")),
    Hook("vllm.lora.resolver:LoRAResolver.resolve_lora", ("self", "base_model_name", "lora_name")),
    Hook("vllm.lora.resolver:LoRAResolverRegistry"),
    Hook("vllm.lora.resolver:_LoRAResolverRegistry.resolvers"),
    Hook("vllm.lora.resolver:_LoRAResolverRegistry.register_resolver", ("self", "resolver_name", "resolver")),
)
# What encoder-decoder models need beside: modules that other engines need not import.
ENCODER_HOOKS = (
    Hook("vllm.config:ModelConfig.architecture"),
    Hook("vllm.config:VllmConfig.use_v2_model_runner"),
    *TOWER_HOOKS,
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.from_string_field"),
    Hook("vllm.model_executor.models.whisper:WhisperForConditionalGeneration.embed_multimodal", ("self",)),
    Hook("vllm.model_executor.models.whisper:WhisperModel.forward", ("self", "positions", "encoder_outputs")),
    Hook(
        "vllm.model_executor.models.whisper:WhisperCrossAttention.forward",
        ("self", "hidden_states", "encoder_hidden_states"),
    ),
    Hook("vllm.v1.core.sched.output:SchedulerOutput.scheduled_encoder_inputs"),
    Hook(f"{_RUNNER}._batch_mm_inputs_from_scheduler", ("self", "scheduler_output"), unless=_ORDERED),
    Hook(
        "vllm.v1.worker.gpu.model_states.encoder_decoder:EncoderDecoderModelState.prepare_inputs_embeds",
        ("self", "scheduled_encoder_inputs", "input_batch", "req_states"),
    ),
    Hook(f"{_SPEECH}._preprocess_speech_to_text", ("self", "request", "audio_data", "request_id")),
    Hook(f"{_SPEECH}._detect_language", ("self", "audio_chunk", "request_id")),
    Hook(f"{_SPEECH}._maybe_get_adapters", ("self", "request")),
    Hook(f"{_ASYNC}.generate", ("self", "prompt", "sampling_params", "request_id", "lora_request")),
    Hook(f"{_ASYNC}.abort", ("self", "request_id")),
)
# How far a request's prompt is computed (activated adapters), by runner: what the other runner's engines never import.
_V1, _V2 = "vllm.v1.worker.gpu_input_batch", "vllm.v1.worker.gpu"
_PROMPTS = f"{_V2}.sample.prompt_logprob:PromptLogprobsWorker"
RUNNER_HOOKS = {
    1: (
        Hook(f"{_MIXIN}.set_active_loras", ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens")),
        Hook(f"{_V1}:InputBatch.__init__", ("self",), sets=("num_computed_tokens_cpu",)),
        Hook(f"{_V1}:InputBatch.req_ids"),
        Hook(f"{_V1}:CachedRequestState.req_id"),
        Hook(f"{_V1}:CachedRequestState.lora_request"),
        Hook(f"{_V1}:CachedRequestState.prompt_token_ids"),
    ),
    2: (
        Hook(f"{_V2}.model_runner:GPUModelRunner.prepare_inputs", ("self", "scheduler_output")),
        Hook(f"{_V2}.lora_utils:LoraState.__init__", ("self",), sets=("lora_requests",)),
        Hook(f"{_V2}.input_batch:InputBatch.req_ids"),
        Hook(f"{_V2}.input_batch:InputBatch.num_computed_tokens_np"),
        Hook(f"{_V2}.input_batch:InputBatch.num_scheduled_tokens"),
        Hook("vllm.v1.core.sched.output:SchedulerOutput.scheduled_new_reqs"),
        Hook("vllm.v1.core.sched.output:NewRequestData.req_id"),
        Hook("vllm.v1.core.sched.output:NewRequestData.prompt_token_ids"),
    ),
}
# Whose rows the output layer runs on when a prompt's logprobs are asked for, by runner.
PROMPT_HOOKS = {
    1: (Hook(f"{_RUNNER}._get_prompt_logprobs_dict", ("self", "hidden_states", "num_scheduled_tokens")),),
    2: (
        Hook(f"{_PROMPTS}.compute_prompt_logprobs", ("self", "logits_fn", "hidden_states")),
        Hook(f"{_PROMPTS}.compute_prompt_token_id_logprobs", ("self", "logits_fn", "hidden_states")),
    ),
}
# Whose the rows are that a classifier's head runs on.
_POOLER = "vllm.model_executor.layers.pooler"
POOLER_HOOKS = (
    Hook(f"{_POOLER}.special:DispatchPooler.__init__", ("self", "poolers_by_task"), sets=("poolers_by_task",)),
    Hook(f"{_POOLER}.seqwise:SequencePooler.__init__", ("self", "pooling", "head"), sets=("head",)),
    Hook(f"{_POOLER}.seqwise:SequencePooler.forward", ("self", "hidden_states", "pooling_metadata")),
    Hook(f"{_POOLER}.seqwise:ClassifierPoolerHead.__init__", ("self", "classifier"), sets=("classifier",)),
    Hook(f"{_POOLER}.seqwise:ClassifierPoolerHead.forward", ("self", "pooled_data", "pooling_metadata")),
    Hook(f"{_POOLER}.tokwise:TokenPooler.forward", ("self", "hidden_states", "pooling_metadata")),
    Hook(f"{_POOLER}.tokwise:TokenClassifierPoolerHead.__init__", ("self", "classifier"), sets=("classifier",)),
    Hook(f"{_POOLER}.tokwise:TokenClassifierPoolerHead.forward_chunk", ("self", "pooled_data", "pooling_param")),
    Hook("vllm.v1.pool.metadata:PoolingMetadata.pooling_params"),
)
_NORMS, _NORM_CLASSES = "vllm.model_executor.layers.layernorm", ("RMSNorm", "GemmaRMSNorm")
NORM_HOOKS = (
    *(Hook(f"{_NORMS}:{name}.__init__", ("self", "hidden_size"), sets=("weight",)) for name in _NORM_CLASSES),
    *(Hook(f"{_NORMS}:{name}.forward_native", ("self", "x", "residual")) for name in _NORM_CLASSES),
    Hook("vllm.config:CompilationMode.NONE"),
    Hook("vllm.config:CompilationConfig.mode"),
)
_CORE = (
    Hook(f"{_RUNNER}.__init__", ("self", "vllm_config"), sets=("vllm_config", "input_batch", "requests")),
    Hook(f"{_KEYS}:_gen_lora_extra_hash_keys", ("request",)),
    Hook(f"{_KEYS}:_gen_prompt_embeds_extra_hash_keys", ("request", "start_token_idx", "end_token_idx")),
    Hook(f"{_KEYS}:generate_block_hash_extra_keys", ("request", "start_token_idx", "end_token_idx")),
    Hook(f"{_ENGINE}.__init__", ("self", "vllm_config"), sets=("request_block_hasher", "scheduler")),
    Hook(f"{_ENGINE}.add_lora", ("self", "lora_request")),
    Hook(f"{_ENGINE}Proc.add_lora", ("self", "lora_request")),
    Hook(f"{_ENGINE}Proc.remove_lora", ("self", "lora_id")),
    Hook(f"{_ENGINE}Proc.add_request", ("self", "request")),
    Hook(f"{_ENGINE}Proc.__init__", ("self", "vllm_config"), sets=("input_queue",)),
    Hook(f"{_ENGINE}Proc._process_input_queue", ("self",)),
    Hook(f"{_ENGINE}Proc._handle_client_request", ("self", "request_type", "request")),
    # Answers a call whose method returned a Future once that is done.
    Hook(f"{_ENGINE}Proc._invoke_utility_method", ("name", "get_result", "output", "enqueue_output")),
    Hook(f"{_ENGINE}Proc.has_work", ("self",)),
    Hook(f"{_ENGINE}Proc.is_running", ("self",)),
    Hook(f"{_ENGINE}.collective_rpc", ("self", "method", "timeout", "args")),
    Hook(f"{_ENGINE}.preprocess_add_request", ("self", "request")),
    Hook("vllm.v1.engine:EngineCoreRequest.prompt_token_ids"),
    Hook("vllm.v1.engine:EngineCoreRequest.prompt_embeds"),
    Hook("vllm.v1.engine:EngineCoreRequest.resumable"),
)
COMMON_HOOKS = _CONFIG + _WORKER_SIDE + _LAYERS + _ENGINES + _SERVER + _CORE + METRICS_HOOKS + SCHEDULER_HOOKS
HOOKS = COMMON_HOOKS + ENCODER_HOOKS + POOLER_HOOKS + NORM_HOOKS
HOOKS += RUNNER_HOOKS[1] + RUNNER_HOOKS[2] + PROMPT_HOOKS[1] + PROMPT_HOOKS[2]
