"""In which order the encoder runs: the batch's, which is the order everything else about a request's rows assumes.

Cross-attention stores keys and values for the requests in the order of the batch. vLLM's V1 runner encodes in the
order of scheduling, which differs where a preempted request comes back beside a new one: each then hears the other's
audio, with or without adapters. Its V2 runner encodes in the order of the batch, but says whose the rows are in the
order of scheduling.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.options import options_of

_ORDERED = "vllm.v1.worker.utils:encoder_inputs_in_batch_order"  # patches/0014


def run_encoder_in_batch_order(runner_version: int) -> None:
    """Have vLLM's model runner of this version encode, and say whose the rows are, in the order of the batch."""
    if not offers(_ORDERED):
        {1: _order_v1, 2: _order_v2}[runner_version]()


def _ordered(scheduled: Mapping[str, list[int]], requests: Iterable[str]) -> dict[str, list[int]]:
    return {request: scheduled[request] for request in requests if scheduled.get(request)}


def _is_ours(config: Any) -> bool:
    return config.model_config.is_encoder_decoder and options_of(config.additional_config) is not None


@functools.cache
def _order_v1() -> None:
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    original = runner._batch_mm_inputs_from_scheduler

    @functools.wraps(original)
    def batch_mm_inputs(self: Any, scheduler_output: Any) -> Any:
        if _is_ours(self.vllm_config):
            inputs = _ordered(scheduler_output.scheduled_encoder_inputs, self.input_batch.req_ids)
            scheduler_output = replace(scheduler_output, scheduled_encoder_inputs=inputs)
        return original(self, scheduler_output)

    runner._batch_mm_inputs_from_scheduler = batch_mm_inputs


@functools.cache
def _order_v2() -> None:
    # The mapping is set by a function that does not know the batch, just before one that does.
    from flora_vllm.plugin.worker_manager import FloraWorkerManager

    runner: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    state = importlib.import_module("vllm.v1.worker.gpu.model_states.encoder_decoder").EncoderDecoderModelState
    set_mapping, prepare = runner.set_active_mm_loras, state.prepare_inputs_embeds
    postponed: list[Callable[..., None]] = []

    @functools.wraps(set_mapping)
    def set_active_mm_loras(**inputs: Any) -> None:
        postponed.clear()
        if isinstance(inputs["lora_manager"], FloraWorkerManager):
            postponed.append(functools.partial(set_mapping, **inputs))
        else:
            set_mapping(**inputs)

    @functools.wraps(prepare)
    def prepare_inputs_embeds(self: Any, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> None:
        for set_postponed in postponed:
            set_postponed(scheduled_encoder_inputs=_ordered(scheduled_encoder_inputs, input_batch.req_ids))
        postponed.clear()
        return prepare(self, scheduled_encoder_inputs, input_batch, req_states)

    runner.set_active_mm_loras, state.prepare_inputs_embeds = set_active_mm_loras, prepare_inputs_embeds
