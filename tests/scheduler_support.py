"""vLLM's own scheduler, stepped by hand, and the clock that it is told."""

import itertools
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch

from flora_vllm.plugin.options import KEY

SLOTS, STEP_S = 2, 0.1
LENGTH = 10  # tokens of an answer, one a step


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class Run:
    """A scheduler, and the steps of an engine that answers at once; `is_async`: one step after it is decided.

    Requests are named after their adapter (0: none), `started` has when each ran first, `done` how many tokens it got,
    `failed` those that ended with an error.
    """

    def __init__(
        self,
        model: Path,
        options: dict[str, Any] | None,
        clock: Clock,
        *,
        policy: str = "fcfs",
        blocks: int = 64,
        slots: int = SLOTS,
        is_async: bool = False,
        is_caching: bool = False,
        kv_transfer: Any = None,
    ) -> None:
        from vllm.config import CacheConfig, DeviceConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        model_config = ModelConfig(model=str(model), dtype="float32", max_model_len=64, skip_tokenizer_init=True)
        config = VllmConfig(
            model_config=model_config,
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=256,
                max_model_len=64,
                is_encoder_decoder=False,
                policy=policy,
                async_scheduling=is_async,
            ),
            cache_config=CacheConfig(block_size=16, enable_prefix_caching=is_caching),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=kv_transfer,
            lora_config=LoRAConfig(max_loras=slots, max_lora_rank=8, lora_dtype="bfloat16"),
        )
        config.additional_config = {} if options is None else {KEY: options}
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.scheduler = (AsyncScheduler if is_async else Scheduler)(
            config,
            KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
            StructuredOutputManager(config),
            block_size=16,
        )
        self.clock = clock
        self.started: dict[str, float] = {}
        self.done: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.scheduled: dict[str, int] = {}  # of the last step, how many tokens of each request
        self.fault: Any = None  # of the next step that is answered
        self._slots, self._is_async = slots, is_async
        self._hasher = get_request_block_hasher(16, sha256_cbor) if is_caching else None
        init_none_hash(sha256_cbor)
        self._undone: deque[Any] = deque()
        self._numbers = itertools.count()

    def ask(
        self, adapter: int, length: int = LENGTH, *, tenant: str = "", key: str = "", priority: int = 0, prompt: int = 3
    ) -> str:
        """`tenant`: what the adapter's name begins with. `key`: the share that the server wrote on the request."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        name = f"{adapter}-{next(self._numbers)}"
        parameters = SamplingParams(max_tokens=length, ignore_eos=True)
        lora = LoRARequest(f"{tenant}adapter-{adapter}", adapter, "/nowhere") if adapter else None
        self.scheduler.add_request(
            Request(
                name,
                list(range(1, prompt + 1)),
                parameters,
                None,
                arrival_time=self.clock.now,
                lora_request=lora,
                priority=priority,
                trace_headers={"x-flora-share": key} if key else None,
                block_hasher=self._hasher,
            )
        )
        return name

    def step(self) -> set[int]:
        """The adapters that ran."""
        output = self.scheduler.schedule()
        self.scheduled = output.num_scheduled_tokens
        names = list(self.scheduled)
        ran = {int(name.split("-")[0]) for name in names} - {0}
        assert len(ran) <= self._slots
        for name in names:
            self.started.setdefault(name, self.clock.now)
        self._undone.append(output)
        while len(self._undone) > self._is_async:
            self._answer(self._undone.popleft())
        self.clock.now += STEP_S
        return ran

    def _answer(self, output: Any) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(output.num_scheduled_tokens)
        numbers = {name: number for number, name in enumerate(names)}
        answer = ModelRunnerOutput(names, numbers, [[5]] * len(names))
        if self.fault is not None:
            self.fault, answer._flora_fault = None, self.fault  # pyright: ignore[reportAttributeAccessIssue]
        made = self.scheduler.update_from_output(output, answer)
        for outputs in made.values():
            self.done.update({one.request_id: len(one.new_token_ids) for one in outputs.outputs})
            self.failed |= {one.request_id for one in outputs.outputs if str(one.finish_reason) == "error"}

    def keep_busy(self, adapters: range, seconds: float) -> None:
        """Requests of these adapters keep coming, so that each always runs, were it not for others."""
        for step in range(round(seconds / STEP_S)):
            if step % (LENGTH // 2) == 0:
                for adapter in adapters:
                    self.ask(adapter)
            self.step()
