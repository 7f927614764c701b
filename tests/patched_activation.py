"""The part of patched_vllm.py about activated adapters: keys of cached blocks, and both runners' rows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.lora.request import LoRARequest

FLORA = {"flora": {"max_rank": 4}}
WOKEN, WHOLE = LoRARequest("woken", 1, "woken"), LoRARequest("whole", 2, "whole")
INVOCATION = (7, 8)
PROMPT = [*range(100, 106), *INVOCATION, *range(9, 15)]


def activation_results() -> list[Any]:
    return [block_results(), v1_rows(), v2_rows()]


def block_results() -> list[Any]:
    """Blocks of 4 tokens, by request: b if the base model's request has its key, f if that of a request with an answer
    has, which holds the invocation again; at last the latter's own, and what is refused."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

    from flora_vllm.errors import AdapterError

    init_none_hash(sha256)
    core: Any = object.__new__(EngineCore)
    core.vllm_config = SimpleNamespace(additional_config=FLORA)
    core.model_executor = SimpleNamespace(
        add_lora=lambda _: True,
        collective_rpc=lambda _m, _t, args, _k: [INVOCATION if args[0] == WOKEN.lora_int_id else None],
    )
    core.request_block_hasher, core.mm_receiver_cache = get_request_block_hasher(4, sha256), None
    seen: list[Any] = [core.add_lora(WOKEN), core.add_lora(WHOLE)]

    def request(prompt: list[int], adapter: Any, **options: Any) -> Any:
        fields: dict[str, Any] = dict.fromkeys(EngineCoreRequest.__struct_fields__)
        fields |= {"request_id": "r", "prompt_token_ids": prompt, "sampling_params": SamplingParams(max_tokens=1)}
        fields |= {"lora_request": adapter, "resumable": False, "arrival_time": 0.0, "current_wave": 0} | options
        return core.preprocess_add_request(EngineCoreRequest(**fields))[0]

    first = request(PROMPT, WOKEN)
    first.append_output_token_ids([*INVOCATION, 3, 4])
    for prompt, adapter in (
        ([*PROMPT, *INVOCATION, 3, 4], WOKEN),
        ([*PROMPT[:7], *PROMPT[:7]], WOKEN),
        ([*INVOCATION, *PROMPT], WOKEN),
        (PROMPT, WHOLE),
    ):
        base = request(prompt, None).block_hashes
        hashes = request(prompt, adapter).block_hashes
        seen.append("".join("b" if h in base else "f" if h in first.block_hashes else "-" for h in hashes))
    base = request([*PROMPT, *INVOCATION, 3, 4], None).block_hashes
    seen.append("".join("b" if h in base else "-" for h in first.block_hashes))
    for options in ({"prompt_embeds": object()}, {"resumable": True}):
        try:
            request(PROMPT, WOKEN, **options)
        except AdapterError as error:
            seen.append(str(error).split(": ")[1].split(";")[0])
    return seen


class Batch:
    """Two steps of three requests: without adapter, woken, and whole; 10 tokens each, in two parts."""

    ids = ("none", "woken", "whole")
    adapters = (None, WOKEN, WHOLE)
    steps = ((0, 8), (8, 2))

    def __init__(self) -> None:
        from flora_vllm.plugin.activation import BaseRows
        from flora_vllm.plugin.worker_manager import FloraWorkerManager

        self.rows: list[Any] = []
        self.manager: Any = object.__new__(FloraWorkerManager)
        self.manager.base_rows = BaseRows(set)
        self.manager.base_rows.learn(1, INVOCATION, "woken")
        self.manager.base_rows.learn(2, None, "whole")
        self.manager._apply_adapters = lambda _: None
        self.manager._adapter_manager = SimpleNamespace(
            get_adapter=lambda _: None,
            set_adapter_mapping=lambda m: self.rows.append(["".join(map(str, m.index_mapping)), *m.prompt_mapping]),
        )

    def runner(self, kind: type) -> Any:
        runner: Any = object.__new__(kind)
        runner.lora_manager, runner.lora_config = self.manager, True
        return runner


def v1_rows() -> list[Any]:
    """The adapters of a step's rows and samples, of the V1 runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from flora_vllm.plugin.activation import follow_positions

    follow_positions(1)
    batch = Batch()
    runner = batch.runner(GPUModelRunner)
    named = zip(Batch.ids, Batch.adapters, strict=True)
    runner.requests = {n: SimpleNamespace(req_id=n, lora_request=a, prompt_token_ids=PROMPT) for n, a in named}
    for computed, count in Batch.steps:
        prompt_ids, ids = (0, 1, 2), tuple(np.repeat([0, 1, 2], count).tolist())
        inputs = SimpleNamespace(
            req_ids=list(Batch.ids),
            num_computed_tokens_cpu=np.array([computed] * 3 + [0] * 5),
            make_lora_inputs=lambda _n, _s, ids=ids, prompt_ids=prompt_ids: (prompt_ids, ids, {WOKEN, WHOLE}),
        )
        runner.set_active_loras(inputs, np.array([count] * 3))
    return batch.rows


def v2_rows() -> list[Any]:
    """The same of the V2 runner: what it does with the batch it has prepared, without the rest of its step."""
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from flora_vllm.plugin.activation import follow_positions

    prepared: list[Any] = []
    GPUModelRunner.prepare_inputs = lambda self, scheduler_output: prepared[0]
    follow_positions(2)
    batch = Batch()
    runner = batch.runner(GPUModelRunner)
    runner.lora_state = LoraState(8)
    sees_prompts = hasattr(runner.lora_state, "prompts")  # with the diff
    for place, (name, adapter) in enumerate(zip(Batch.ids, Batch.adapters, strict=True)):
        runner.lora_state.add_request(name, place, adapter, *([PROMPT] if sees_prompts else []))
    new = [SimpleNamespace(req_id=name, prompt_token_ids=PROMPT) for name in Batch.ids]
    for computed, count in Batch.steps:
        counts = np.array([count] * 3)
        prepared[:] = [
            SimpleNamespace(
                req_ids=list(Batch.ids), num_computed_tokens_np=np.array([computed] * 3), num_scheduled_tokens=counts
            )
        ]
        inputs = runner.prepare_inputs(SimpleNamespace(scheduled_new_reqs=new if computed == 0 else []))
        if sees_prompts:  # what its `execute_model` does then
            adapters, prompts = runner.lora_state.lora_requests, runner.lora_state.prompts
            requests = [(name, adapters.get(name), prompts.get(name)) for name in inputs.req_ids]
            runner.lora_manager.note_batch(requests, inputs.num_computed_tokens_np, counts)
        runner._set_active_loras(*runner.lora_state.make_lora_inputs(inputs.req_ids, np.arange(3), counts))
    return batch.rows
