"""Activated adapters in vLLM: which tokens of a request are the base model's, and whose their cached blocks are.

Two processes must agree on a request's first adapted token. The engine's core keys the blocks of its prefix cache by
it: a block that ends before that token has the base model's key, a later one the adapter's together with the token's
index (the same text can begin to be the adapter's at another token, once a prompt and once with an answer in it). The
workers map the tokens before it to no adapter. Both find it in the prompt's own tokens, which never change, by the
invocation sequence that the workers read when they loaded the adapter; the core asks them for it. So an answer, a
preemption or speculated tokens cannot move it.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from flora_vllm.errors import AdapterError, StepError, adapter_error
from flora_vllm.formats.activation import first_adapted_token
from flora_vllm.plugin.hook_table import RUNNER_HOOKS
from flora_vllm.plugin.hooks import offers, verify
from flora_vllm.plugin.options import options_of

NEVER = sys.maxsize
# Adapters without an invocation sequence that are known by id; where more are in memory, twice those.
MOST_WHOLE = 4096
_CORE_TELLS = "vllm.v1.engine.core:EngineCore.lora_added"  # patches/0017
_BATCH_TOLD = "vllm.lora.worker_manager:WorkerLoRAManager.note_batch"  # patches/0018


class BaseRows:
    """Worker side: which rows of the step that comes are the base model's although their request has an adapter.

    `invocations`: adapter id -> its invocation sequence, of every activated adapter this worker ever loaded. `held`:
    the ids of the adapters that it has in memory now.
    """

    def __init__(self, held: Callable[[], Collection[int]]) -> None:
        self.invocations: dict[int, tuple[int, ...]] = {}
        self._held = held
        self._whole: set[int] = set()  # adapters that apply to every token
        self._most_whole = MOST_WHOLE
        self._first: dict[str, tuple[Sequence[int], int]] = {}
        self._noted: tuple[torch.Tensor, torch.Tensor] | None = None

    def learn(self, adapter_id: int, invocation: tuple[int, ...] | None, name: str, *, announced: bool = True) -> None:
        """An adapter is about to be loaded; `announced`: by `add_lora`, of which the engine's core knows too.

        Raises AdapterError if another of this id began elsewhere: requests may be running. Raises StepError for an
        activated adapter that the core never heard of: it has keyed the blocks of its requests as if it began at once.
        """
        known = None if adapter_id in self._whole else self.invocations.get(adapter_id, invocation)
        if known != invocation:
            raise adapter_error(
                repr(name),
                [
                    f"its id {adapter_id} is that of an adapter with other alora_invocation_tokens, which running "
                    "requests follow; load it under another id"
                ],
            )
        if invocation is None:
            self._whole.add(adapter_id)
            if len(self._whole) > self._most_whole:  # those that no step can be using
                self._whole &= {*self._held(), adapter_id}
                self._most_whole = max(MOST_WHOLE, 2 * len(self._whole))
        elif not announced and adapter_id not in self.invocations:
            raise StepError(f"activated adapter {name!r} reached a step without having been loaded before")
        else:
            self.invocations[adapter_id] = invocation

    def note(
        self,
        requests: Sequence[tuple[str, int, Sequence[int] | None]],
        computed: Sequence[int],
        scheduled: Sequence[int],
        sampled: Sequence[int] | None,
    ) -> None:
        """The batch of the step that comes: (request id, adapter id, prompt) of each request in batch order, how many
        of its tokens are computed, how many the step adds and of how many it samples the next (one if None)."""
        self._noted = None
        if not any(adapter in self.invocations for _, adapter, _ in requests):
            self._first.clear()
            return
        self._first = {name: self._decide(name, adapter, prompt) for name, adapter, prompt in requests}
        rows: list[bool] = []
        samples: list[bool] = []
        for i, (name, _, _) in enumerate(requests):
            count = int(scheduled[i])
            before = min(max(self._first[name][1] - int(computed[i]), 0), count)
            rows += [True] * before + [False] * (count - before)
            samples += rows[len(rows) - (1 if sampled is None else int(sampled[i])) :]
        self._noted = torch.tensor(rows, dtype=torch.bool), torch.tensor(samples, dtype=torch.bool)

    def _decide(self, request: str, adapter: int, prompt: Sequence[int] | None) -> tuple[Sequence[int], int]:
        """(prompt, its first adapted token): as last time while the prompt is the same object."""
        known = self._first.get(request)
        if known is not None and known[0] is prompt:
            return known
        invocation = self.invocations.get(adapter)
        if invocation is None:
            return prompt or (), 0
        if prompt is None:
            raise StepError(f"request {request!r} has an activated adapter and no token ids; it should not be here")
        first = first_adapted_token(prompt, invocation)
        return prompt, NEVER if first is None else first

    def without_base_rows(self, mapping: Any, adapters: Collection[int]) -> Any:
        """The mapping of the step whose batch was noted last, with no adapter where a row is the base model's.

        Raises StepError if an activated one is among the step's `adapters` and nobody said which rows are its: all of
        them would be wrong.
        """
        noted, self._noted = self._noted, None
        if noted is None:
            if any(adapter in self.invocations for adapter in adapters):
                raise StepError(
                    "a step with activated adapters (alora_invocation_tokens) began without its requests' positions; "
                    "please report this with vLLM's start-up log"
                )
            return mapping
        rows, samples = noted
        return replace(
            mapping,
            index_mapping=_without(mapping.index_mapping, rows),
            prompt_mapping=_without(mapping.prompt_mapping, samples),
        )


def _without(ids: Sequence[int], base: torch.Tensor) -> tuple[int, ...]:
    ids_T = torch.as_tensor(ids, dtype=torch.int64)
    if len(ids_T) != len(base):
        raise StepError(f"a step's mapping has {len(ids_T)} rows, its batch {len(base)}; adapters cannot follow")
    return tuple(ids_T.masked_fill(base, 0).tolist())


@functools.cache
def follow_positions(runner_version: int) -> None:
    """Have vLLM's model runner of this version tell our worker manager of each step's batch. Raises HookError."""
    verify(importlib.import_module("vllm.platforms").current_platform.device_type, RUNNER_HOOKS[runner_version])
    if not offers(_BATCH_TOLD):
        {1: _tell_v1, 2: _tell_v2}[runner_version]()


def _tell_v1() -> None:
    mixin: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin").LoRAModelRunnerMixin
    original = mixin.set_active_loras

    @functools.wraps(original)
    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None, *rest):
        if hasattr(self.lora_manager, "note_batch"):
            requests = [self.requests[name] for name in input_batch.req_ids]
            self.lora_manager.note_batch(
                [(r.req_id, r.lora_request, r.prompt_token_ids) for r in requests],
                input_batch.num_computed_tokens_cpu,
                num_scheduled_tokens,
                num_sampled_tokens,
            )
        return original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *rest)

    mixin.set_active_loras = set_active_loras


def _tell_v2() -> None:
    runner: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    original = runner.prepare_inputs

    @functools.wraps(original)
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        if hasattr(getattr(self, "lora_manager", None), "note_batch"):
            adapters = self.lora_state.lora_requests
            prompts = self.__dict__.setdefault("_flora_prompts", {})
            for gone in prompts.keys() - adapters.keys():
                del prompts[gone]
            prompts |= {new.req_id: new.prompt_token_ids for new in scheduler_output.scheduled_new_reqs}
            self.lora_manager.note_batch(
                [(name, adapters.get(name), prompts.get(name)) for name in batch.req_ids],
                batch.num_computed_tokens_np,
                batch.num_scheduled_tokens,
                None,
            )
        return batch

    runner.prepare_inputs = prepare_inputs


def key_blocks_by_first_token() -> None:
    """Have the engine's core key the blocks of activated adapters' requests by what computed them."""
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCore
    if offers(_CORE_TELLS):
        core.lora_added, core.request_arrives = staticmethod(learn_start), staticmethod(_admit)
        return
    _key_by_start()
    add_lora, preprocess = core.add_lora, core.preprocess_add_request

    @functools.wraps(add_lora)
    def add_and_learn(self: Any, lora_request: Any) -> bool:
        added = add_lora(self, lora_request)
        learn_start(self, lora_request)
        return added

    @functools.wraps(preprocess)
    def admit_and_preprocess(self: Any, request: Any) -> Any:
        _admit(self, request)
        return preprocess(self, request)

    core.add_lora, core.preprocess_add_request = add_and_learn, admit_and_preprocess


def _key_by_start() -> None:
    keys: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")
    lora_keys, embeds_keys = keys._gen_lora_extra_hash_keys, keys._gen_prompt_embeds_extra_hash_keys

    @functools.wraps(lora_keys)
    def lora_keys_of_whole_requests(request: Any) -> list[tuple]:
        return [] if getattr(request, "lora_start", 0) else lora_keys(request)

    @functools.wraps(embeds_keys)
    def embeds_and_lora_keys(request: Any, start_token_idx: int, end_token_idx: int) -> list[tuple]:
        # vLLM's function of LoRA's keys does not know the block, this one does.
        found = embeds_keys(request, start_token_idx, end_token_idx)
        first = getattr(request, "lora_start", 0)
        return [*found, *((*key, first) for key in lora_keys(request))] if 0 < first < end_token_idx else found

    keys._gen_lora_extra_hash_keys = lora_keys_of_whole_requests
    keys._gen_prompt_embeds_extra_hash_keys = embeds_and_lora_keys


def learn_start(core: Any, lora_request: Any) -> None:
    """The workers have loaded an adapter: from which sequence on does it apply?"""
    if options_of(core.vllm_config.additional_config) is None:
        return
    adapter = lora_request.lora_int_id
    found = core.collective_rpc(_invocation_of, args=(adapter,))
    assert all(other == found[0] for other in found), "all workers read the same file"
    invocations = core.__dict__.setdefault("_flora_invocations", {})
    if found[0] is None:
        return
    if not invocations and core.request_block_hasher is not None:
        core.request_block_hasher = _mark_starts(core.request_block_hasher, invocations)
    invocations[adapter] = found[0]


def _invocation_of(worker: Any, adapter: int) -> tuple[int, ...] | None:
    """Runs in a worker."""
    return worker.model_runner.lora_manager.base_rows.invocations.get(adapter)


def _mark_starts(hasher: Any, invocations: dict[int, tuple[int, ...]]) -> Any:
    """`hasher`, which a request calls while it is made and whenever it grew, marks its first adapted token first."""

    @functools.wraps(hasher)
    def mark_and_hash(request: Any) -> Any:
        adapter = request.lora_request
        if adapter is not None and "lora_start" not in vars(request) and adapter.lora_int_id in invocations:
            first = first_adapted_token(request.prompt_token_ids, invocations[adapter.lora_int_id])
            request.lora_start = NEVER if first is None else first
        return hasher(request)

    return mark_and_hash


def _admit(core: Any, request: Any) -> None:
    """Refuse a request whose first adapted token cannot be told, or can change. Raises AdapterError."""
    adapter = request.lora_request
    if adapter is None or adapter.lora_int_id not in core.__dict__.get("_flora_invocations", {}):
        return
    asked = {
        "its prompt has embeddings in place of tokens": request.prompt_embeds is not None
        or request.prompt_token_ids is None,
        "its prompt comes in pieces (a streaming session)": request.resumable,
    }
    if faults := [fault for fault, holds in asked.items() if holds]:
        raise AdapterError(
            f"request {request.request_id!r} cannot use adapter {adapter.lora_name!r}, which applies from its "
            f"alora_invocation_tokens on: {'; '.join(faults)}; send token ids or text, whole"
        )
