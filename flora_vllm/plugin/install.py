"""Replaces vLLM's seams. Each replacement keeps the original, is made once, and does nothing for engines without FLoRA.

Each has a numbered, upstream-ready diff in patches/ that would make it unnecessary; where vLLM already has the hook
such a diff adds, the replacement steps aside.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from flora_vllm import pacing
from flora_vllm.plugin import (
    activation,
    asleep,
    hooks,
    loads,
    mistakes,
    new_weights,
    prefetch,
    published,
    refusals,
    shares,
    step_faults,
    traces,
    traffic,
    turns,
)
from flora_vllm.plugin.options import options_of

_installed: set[str] = set()


def device_type() -> str:
    return importlib.import_module("vllm.platforms").current_platform.device_type


def install_all() -> None:
    """Verify this vLLM, then replace every seam in this process. Raises HookError with all faults."""
    hooks.verify(device_type())
    from flora_vllm.plugin import (
        default_adapters,
        ending,
        frontend,
        gate,
        guard,
        lent,
        mix_requests,
        restarted,
        speech,
        stored_responses,
    )

    _once("cpu platform", _keep_compile_on_cpu)
    frontend.install()
    guard.install()
    gate.install()
    _once("mixes", mix_requests.install)
    _once("default adapters", default_adapters.install)
    _once("lent adapters", lent.install)
    _once("stored responses", stored_responses.install)
    _once("aborted speech", speech.abort_own_requests_only)
    _once("restarted", restarted.install)
    _once("ending", ending.install)
    _once("published names", published.name_metrics)
    _once("traces", traces.install)
    _once("traffic", traffic.install)
    _once("marked requests", shares.install_request_side)
    _once("failed requests", step_faults.install_request_side)
    install_worker_side()


def install_worker_side() -> None:
    """What a process needs that runs the model; also called where the engine's config arrives."""
    mistakes.log_in_one_line()
    _once("cores", pacing.note_cores)
    _once("op", lambda: importlib.import_module("flora_vllm.layers"))
    _once("embedding op", lambda: importlib.import_module("flora_vllm.embedding"))
    _once("worker manager", _replace_worker_manager)
    _once("names in events", published.name_events)
    _once("ended requests", step_faults.install_scheduler_side)
    _once("experts", _build_experts_without_lora)
    _once("refusals", refusals.answer_with_refusals)
    _once("reports", loads.offer_report)
    _once("turns", turns.install)
    _once("shares", shares.install)
    _once("block keys", activation.key_blocks_by_first_token)
    _once("loads beside steps", prefetch.install)
    _once("waits asleep", asleep.install)
    if device_type() == "cpu":
        _once("cpu weights", _keep_cpu_weights)
        _once("new weights", new_weights.install)
    else:
        _once("cuda graphs", _keep_adapter_steps_out_of_graphs)


def install_replays() -> None:
    """For engines whose CUDA graphs are captured with the op."""
    _once("replays", _write_steps_before_replays)


def _once(name: str, action: Callable[[], Any]) -> None:
    if name not in _installed:
        action()
        _installed.add(name)


def _replace_worker_manager() -> None:
    mixin: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    factories = importlib.import_module("vllm.lora.worker_manager")
    stock = getattr(mixin, "LRUCacheWorkerLoRAManager", factories.LRUCacheWorkerLoRAManager)

    def make_worker_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if options_of(vllm_config.additional_config) is None:
            return stock(vllm_config, *args, **kwargs)
        manager = importlib.import_module("flora_vllm.plugin.worker_manager")
        return manager.FloraWorkerManager(vllm_config, *args, **kwargs)

    if hooks.offers("vllm.lora.worker_manager:set_worker_lora_manager_factory"):  # patches/0001
        factories.set_worker_lora_manager_factory(make_worker_manager)
    else:
        mixin.LRUCacheWorkerLoRAManager = make_worker_manager


def _keep_compile_on_cpu() -> None:
    """vLLM turns torch.compile off on CPU when LoRA is on, for its own kernels' sake; our op does not need that."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    if hooks.offers("vllm.platforms.cpu:CpuPlatform.lora_supports_compile"):  # patches/0005
        others = platform.lora_supports_compile
        platform.lora_supports_compile = staticmethod(
            lambda config: options_of(config.additional_config) is not None or others(config)
        )
        return
    original = platform.__dict__["check_and_update_config"].__func__

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if options_of(vllm_config.additional_config) is None:
            return original(cls, vllm_config)
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    platform.check_and_update_config = classmethod(check_and_update_config)


def _keep_cpu_weights() -> None:
    """vLLM repacks W on CPU and frees it; a layer that will own its base call keeps W until it is attached."""
    utils: Any = importlib.import_module("vllm.model_executor.layers.utils")
    linear_base = importlib.import_module("vllm.model_executor.layers.linear").LinearBase
    current_config = importlib.import_module("vllm.config").get_current_vllm_config_or_none
    original = utils.dispatch_cpu_unquantized_gemm

    def is_kept(layer: Any) -> bool:
        config = current_config()
        return (
            config is not None
            and options_of(config.additional_config) is not None
            and isinstance(layer, linear_base)
            and layer.weight.ndim == 2
            and not layer.weight.is_meta
        )

    def keep(layer: Any) -> bool:
        if is_kept(layer):
            layer._flora_pack = functools.partial(original, layer, remove_weight=True, keep_weight=False)
            return True
        return False

    if hooks.offers("vllm.model_executor.layers.utils:set_cpu_weight_keeper"):  # patches/0006
        utils.set_cpu_weight_keeper(keep)
        return

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        if is_kept(layer):
            layer.cpu_linear = torch.nn.functional.linear  # also serves layers never attached (draft models)
            layer._flora_pack = functools.partial(original, layer, remove_weight)
        else:
            original(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def _build_experts_without_lora() -> None:
    """vLLM builds experts for its LoRA kernels wherever LoRA is on; our adapters need none of them."""
    layer: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    current_config = importlib.import_module("vllm.config").get_current_vllm_config_or_none

    def is_ours(config: Any) -> bool:
        return config is not None and options_of(config.additional_config) is not None

    if hooks.offers("vllm.model_executor.layers.fused_moe.layer:experts_take_lora"):  # patches/0012
        take_lora = layer.experts_take_lora
        layer.experts_take_lora = lambda config: take_lora(config) and not is_ours(config)
        return
    original = layer.FusedMoEConfig

    @functools.wraps(original, updated=())
    def moe_config(*args: Any, **kwargs: Any) -> Any:
        if is_ours(current_config()):
            kwargs["is_lora_enabled"] = False
        return original(*args, **kwargs)

    layer.FusedMoEConfig = moe_config


def _keep_adapter_steps_out_of_graphs() -> None:
    """A step with adapter tokens may not replay a CUDA graph unless it was captured with the op and has room for it."""
    from flora_vllm.plugin import manager

    forward = importlib.import_module("vllm.forward_context")
    mode_none = importlib.import_module("vllm.config").CUDAGraphMode.NONE
    dispatcher = importlib.import_module("vllm.v1.cudagraph_dispatcher").CudagraphDispatcher
    graphs = importlib.import_module("vllm.v1.worker.gpu.cudagraph_utils").CudaGraphManager
    if hooks.offers("vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.runs_eager"):  # patches/0010
        dispatcher.runs_eager = staticmethod(lambda _: manager.step_runs_eager())
        graphs.runs_eager = staticmethod(lambda loras, tokens: manager.adapters_run_eager(loras, tokens))
        return
    v1_dispatch = dispatcher.dispatch

    @functools.wraps(v1_dispatch)
    def dispatch_v1(self: Any, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if manager.step_runs_eager():
            return mode_none, forward.BatchDescriptor(num_tokens)
        return v1_dispatch(self, num_tokens, *args, **kwargs)

    dispatcher.dispatch = dispatch_v1

    v2_dispatch = graphs.dispatch

    @functools.wraps(v2_dispatch)
    def dispatch_v2(self: Any, num_reqs: int, num_tokens: int, uniform: Any, num_active_loras: int, *args, **kwargs):
        # This runner dispatches before the step's mapping is set; these numbers are all there is.
        if not (self._graphs_captured and manager.adapters_run_eager(num_active_loras, num_tokens)):
            return v2_dispatch(self, num_reqs, num_tokens, uniform, num_active_loras, *args, **kwargs)
        self._graphs_captured = False
        try:
            return v2_dispatch(self, num_reqs, num_tokens, uniform, num_active_loras, *args, **kwargs)
        finally:
            self._graphs_captured = True

    graphs.dispatch = dispatch_v2


def _write_steps_before_replays() -> None:
    """What a graph with the op reads of a step is written when it is known which graph replays: right before it."""
    from flora_vllm.plugin import manager

    forward = importlib.import_module("vllm.forward_context")
    wrapper: Any = importlib.import_module("vllm.compilation.cuda_graph").CUDAGraphWrapper
    graphs: Any = importlib.import_module("vllm.v1.worker.gpu.cudagraph_utils").CudaGraphManager

    def tell(descriptor: Any) -> None:
        manager.before_replay(descriptor.num_active_loras, descriptor.num_tokens)

    if hooks.offers("vllm.compilation.cuda_graph:CUDAGraphWrapper.before_replay"):  # patches/0016
        wrapper.before_replay = graphs.before_replay = staticmethod(tell)
        return
    call = wrapper.__call__

    @functools.wraps(call)
    def call_told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if forward.is_forward_context_available():
            context = forward.get_forward_context()
            if context.cudagraph_runtime_mode == self.runtime_mode:
                entry = self.concrete_cudagraph_entries.get(context.batch_descriptor)
                if entry is not None and entry.cudagraph is not None:
                    tell(context.batch_descriptor)
        return call(self, *args, **kwargs)

    wrapper.__call__ = call_told
    run_fullgraph = graphs.run_fullgraph

    @functools.wraps(run_fullgraph)
    def run_told(self: Any, desc: Any) -> Any:
        tell(desc)
        return run_fullgraph(self, desc)

    graphs.run_fullgraph = run_told
