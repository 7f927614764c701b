"""A step that could not serve its adapters fails their requests, not the engine.

vLLM ends its engine when a step raises, and with it everybody's requests. So a fault of ours travels beside the step's
output: the worker notes it on the output, the scheduler finishes the requests that use an adapter with an error
instead of the tokens sampled for them, and whoever waits for one of them gets a StepError. What those requests left in
the prefix cache and among the encoder's outputs is evicted: it is not their adapter's.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora_vllm.errors import StepError
from flora_vllm.plugin.stage_faults import StageFaults

logger = logging.getLogger(__name__)

_FAULT = "_flora_fault"  # on a step's output, on its way from the worker to the scheduler
_STAGES, _HEARD = "_flora_stages", "_flora_heard"  # on a worker of a pipeline: StageFaults, and what it heard last
_OFFLINE = "_flora_errors"  # of requests that nobody waits for in a queue, on the output processor
_MARK = "flora-vllm: "  # what such an error's reason begins with, on its way to the request


@dataclass(frozen=True)
class StepFault:
    """Why a step's output may not be used, for the requests of these adapters (by id); None: of any adapter."""

    reason: str
    adapters: frozenset[int] | None = None


@functools.cache
def note_on_outputs() -> None:
    """Have the workers of this process note on a step's output why it may not be used."""
    worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    pipeline = importlib.import_module("vllm.distributed.parallel_state").get_pp_group

    def noting(original: Callable[..., Any], *, runs: bool) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            manager: Any = getattr(getattr(self.model_runner, "lora_manager", None), "_adapter_manager", None)
            if not hasattr(manager, "take_fault"):
                return original(self, given, *args, **kwargs)
            with manager.turns.step():
                output = original(self, given, *args, **kwargs)
            stages = pipeline()
            if runs and stages.world_size > 1 and given.total_num_scheduled_tokens > 0:
                told = self.__dict__.setdefault(_STAGES, StageFaults(stages))
                if not stages.is_last_rank:
                    told.tell(manager.take_fault())
                else:
                    self.__dict__[_HEARD] = told.hear()
            # A step in two parts (run the model, then sample) is judged with its second.
            if output is None or not stages.is_last_rank:
                return output
            faults = self.__dict__.pop(_HEARD, [])
            fault = _joined([*faults, manager.take_fault()])
            if fault is not None:
                _note(output, fault)
            return output

        return run

    worker.execute_model = noting(worker.execute_model, runs=True)
    worker.sample_tokens = noting(worker.sample_tokens, runs=False)
    dummy = worker.execute_dummy_batch

    @functools.wraps(dummy)
    def execute_dummy_batch(self: Any) -> None:
        """A step without requests, beside other data-parallel ranks' steps."""
        loaded: Any = getattr(self.model_runner, "lora_manager", None)
        with loaded.idle_step() if hasattr(loaded, "idle_step") else contextlib.nullcontext():
            dummy(self)

    worker.execute_dummy_batch = execute_dummy_batch


def _joined(faults: Iterable[StepFault | None]) -> StepFault | None:
    """One fault for those of all stages."""
    found = [fault for fault in faults if fault is not None]
    if not found:
        return None
    of_some = [fault.adapters for fault in found if fault.adapters is not None]
    adapters = frozenset[int]().union(*of_some) if len(of_some) == len(found) else None
    return StepFault("; ".join(dict.fromkeys(fault.reason for fault in found)), adapters)


def _note(output: Any, fault: StepFault) -> None:
    """Mark a step's output, or what will make it once the device is done."""
    if not hasattr(output, "get_output"):
        setattr(output, _FAULT, fault)
        return
    get_output = output.get_output

    def get_noted() -> Any:
        made = get_output()
        setattr(made, _FAULT, fault)
        return made

    output.get_output = get_noted


def install_scheduler_side() -> None:
    """Have the scheduler end the requests of a noted step."""
    scheduler = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
    update = scheduler.update_from_output

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        fault: StepFault | None = getattr(model_runner_output, _FAULT, None)
        failed = [] if fault is None else _fail(self, scheduler_output.num_scheduled_tokens, fault)
        outputs = update(self, scheduler_output, model_runner_output)
        for request in failed:
            _deliver(outputs, request, "" if fault is None else fault.reason)
        return outputs

    scheduler.update_from_output = update_from_output


def install_request_side() -> None:
    """Have whoever waits for a request that was ended so get the error: in its queue, or from the offline LLM."""
    processor = importlib.import_module("vllm.v1.engine.output_processor").OutputProcessor
    process = processor.process_outputs

    @functools.wraps(process)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        failed = _failed_states(self.request_states, engine_core_outputs)
        processed = process(self, engine_core_outputs, *args, **kwargs)
        for state, error in failed:
            if state.queue is not None:
                state.queue.put(error)
            else:
                self.__dict__.setdefault(_OFFLINE, []).append(error)
        return processed

    processor.process_outputs = process_outputs
    llm: Any = importlib.import_module("vllm.entrypoints.llm").LLM
    llm._run_engine = _raising(llm._run_engine)
    llm._run_tiling_engine = _raising(llm._run_tiling_engine)  # pooling requests have a loop of their own


def _raising(run: Callable[..., Any]) -> Callable[..., Any]:
    """The offline LLM's loop over its engine's steps; raises the first fault when all requests are done."""

    @functools.wraps(run)
    def run_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = run(self, *args, **kwargs)
        errors = self.llm_engine.output_processor.__dict__.pop(_OFFLINE, [])
        if errors:
            raise errors[0]
        return outputs

    return run_all


def _fail(scheduler: Any, scheduled: Mapping[str, int], fault: StepFault) -> list[Any]:
    """Finish the requests that the fault is of; before the scheduler would take the step's tokens."""
    status = importlib.import_module("vllm.v1.request").RequestStatus.FINISHED_ERROR

    def is_its(request: Any) -> bool:
        adapter = request.lora_request
        return adapter is not None and (fault.adapters is None or adapter.lora_int_id in fault.adapters)

    def blocks_of(names: Iterable[str]) -> set[int]:
        return {block for name in names for group in scheduler.kv_cache_manager.get_block_ids(name) for block in group}

    known = [scheduler.requests[name] for name in scheduled if name in scheduler.requests]
    failing = [request.request_id for request in known if is_its(request)]
    null = {scheduler.kv_cache_manager.block_pool.null_block.block_id}
    unfilled = blocks_of(failing) - null
    # Of a request that was aborted or preempted meanwhile nobody knows the blocks any more: they may be any.
    is_any = any(not blocks_of([name]) for name in scheduled)
    # Under asynchronous scheduling the next step is made by now, with blocks that this one was to fill.
    later = [
        request.request_id for request in scheduler.running if is_its(request) and request.request_id not in scheduled
    ]
    failing += [name for name in later if is_any or not unfilled.isdisjoint(blocks_of([name]))]
    if is_any:
        others = blocks_of(request.request_id for request in scheduler.running if request.request_id not in failing)
        every = range(len(scheduler.kv_cache_manager.block_pool.blocks))
        scheduler.kv_cache_manager.evict_blocks({*every} - others - null)
    else:
        scheduler.kv_cache_manager.evict_blocks(blocks_of(failing))
    requests = [scheduler.requests[name] for name in failing]
    failed = scheduler.finish_requests(failing, status)
    drop_encodings(scheduler.encoder_cache_manager, None if is_any else requests)
    _forget_stored(scheduler)
    logger.error("%d requests of a step with adapters were ended with an error: %s", len(failed), fault.reason)
    return failed


def _forget_stored(scheduler: Any) -> None:
    """Empty what a KV connector keeps elsewhere: it stores blocks of a step before that is known to have failed."""
    connector = scheduler.connector
    if connector is None:
        return
    base = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base").KVConnectorBase_V1
    emptied = type(connector).reset_cache is not base.reset_cache  # else vLLM says so though nothing happens
    try:
        emptied = emptied and scheduler.reset_connector_cache()
    except Exception:
        # vLLM's own asserts that it was not asked twice between two steps. To raise would end the engine for everybody,
        # and the step's requests have failed already; what may still be stored is said below.
        logger.exception("%s was asked to forget what it has stored", type(connector).__name__)
        emptied = False
    if not emptied:
        logger.error(
            "%s cannot be emptied and may hold blocks of that step, which later requests of its adapters would take "
            "for theirs; empty the store that it writes to, or restart it",
            type(connector).__name__,
        )


def drop_encodings(cache: Any, requests: Sequence[Any] | None) -> None:
    """Forget the encoder's outputs of these requests, which are finished (None: of all that are); the worker is told
    with the next step.

    `cache`: vLLM's manager of them. That of encoder-decoder models keeps nothing for a later request.
    """
    kept = {*getattr(cache, "freeable", ())}
    if requests is not None:
        kept &= {feature.identifier for request in requests for feature in request.mm_features}
    for name in kept:
        if name in cache.freeable:
            cache.num_free_slots += cache.freeable.pop(name)
            del cache.cached[name], cache.num_embeds_by_hash[name]
            cache.freed.append(name)


def _deliver(outputs: dict[int, Any], request: Any, reason: str) -> None:
    engine = importlib.import_module("vllm.v1.engine")
    output = engine.EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=_MARK + reason,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
    if request.client_index not in outputs:
        outputs[request.client_index] = engine.EngineCoreOutputs(outputs=[])
    outputs[request.client_index].outputs.append(output)


def _failed_states(states: Mapping[str, Any], outputs: Sequence[Any]) -> list[tuple[Any, StepError]]:
    """(state, error) of each request that these outputs end with a fault of ours."""
    failed = []
    for output in outputs:
        state, reason = states.get(output.request_id), output.stop_reason
        if state is None or not (isinstance(reason, str) and reason.startswith(_MARK)):
            continue
        if state.detokenizer is None:  # a pooling request: without a result it cannot be finished
            output.pooling_output = torch.empty(0)
        failed.append((state, StepError(reason.removeprefix(_MARK))))
    return failed
