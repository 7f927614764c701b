"""vLLM's own scheduler with adapters that want more slots than there are: who waits, and for how long."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_vllm.plugin import turns
from flora_vllm.plugin.options import KEY

# vLLM's config imports warn about others' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

SLOTS, WAIT_S, STEP_S = 2, 5.0, 0.1
LENGTH = 10  # tokens of an answer, one a step


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns, "time", made)
    return made


@pytest.fixture
def make(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable:
    """`make(**options)`: a run of a scheduler whose engine was given these options; None: without FLoRA."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("schedule", "_handle_blocked_waiting_request"):
        monkeypatch.setattr(Scheduler, name, unwrapped(getattr(Scheduler, name)))
    turns.install()
    return lambda options, **more: Run(tiny_model("llama"), options, clock, **more)


def unwrapped(function: Any) -> Any:
    return getattr(function, "__wrapped__", function)


class Run:
    """A scheduler, and the steps of an engine that answers at once."""

    def __init__(self, model: Path, options: dict[str, Any] | None, clock: Clock, policy: str = "fcfs") -> None:
        from vllm.config import CacheConfig, DeviceConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
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
                async_scheduling=False,
            ),
            cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
            device_config=DeviceConfig("cpu"),
            lora_config=LoRAConfig(max_loras=SLOTS, max_lora_rank=8, lora_dtype="bfloat16"),
        )
        config.additional_config = {} if options is None else {KEY: options}
        config.cache_config.num_gpu_blocks = 64
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.scheduler = Scheduler(
            config,
            KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
            StructuredOutputManager(config),
            block_size=16,
        )
        self.clock = clock
        self.started: dict[str, float] = {}  # request -> when it ran first
        self._numbers = itertools.count()

    def ask(self, adapter: int, length: int = LENGTH) -> str:
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        name = f"{adapter}-{next(self._numbers)}"
        parameters = SamplingParams(max_tokens=length, ignore_eos=True)
        lora = LoRARequest(f"adapter-{adapter}", adapter, "/nowhere") if adapter else None
        self.scheduler.add_request(
            Request(name, [1, 2, 3], parameters, None, arrival_time=self.clock.now, lora_request=lora)
        )
        return name

    def step(self) -> set[int]:
        """The adapters that ran."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        ran = {int(name.split("-")[0]) for name in names} - {0}
        assert len(ran) <= SLOTS
        for name in names:
            self.started.setdefault(name, self.clock.now)
        numbers = {name: number for number, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, numbers, [[5]] * len(names)))
        self.clock.now += STEP_S
        return ran

    def keep_busy(self, adapters: range, seconds: float) -> None:
        """Requests of these adapters keep coming, so that each always runs, were it not for others."""
        for step in range(round(seconds / STEP_S)):
            if step % (LENGTH // 2) == 0:
                for adapter in adapters:
                    self.ask(adapter)
            self.step()


def test_stock_vllm_lets_an_adapter_starve(make: Callable) -> None:
    run = make(None)
    run.keep_busy(range(1, 3), 1.0)
    last = run.ask(3)
    run.keep_busy(range(1, 3), 30.0)
    assert last not in run.started


def test_an_adapter_that_waited_gets_a_slot_within_the_bound(make: Callable, clock: Clock) -> None:
    run = make({"adapter_wait": WAIT_S})
    run.keep_busy(range(1, 3), 1.0)
    asked_s = clock.now
    last = run.ask(3)
    run.keep_busy(range(1, 3), 30.0)
    waited_s = run.started[last] - asked_s
    assert WAIT_S <= waited_s <= WAIT_S + (LENGTH + 2) * STEP_S
    assert turns.counts(run.scheduler)["drained"] >= 1
    # Adapters 1 and 2 went on, the drained one after its own wait.
    assert all(any(name.startswith(f"{adapter}-") for name in list(run.started)[-30:]) for adapter in (1, 2))


def test_several_that_waited_get_slots_in_turn(make: Callable, clock: Clock) -> None:
    run = make({"adapter_wait": WAIT_S})
    run.keep_busy(range(1, 3), 1.0)
    asked_s = clock.now
    names = [run.ask(adapter) for adapter in (3, 4, 5, 6)]
    run.keep_busy(range(1, 3), 30.0)
    rounds = [(run.started[name] - asked_s - WAIT_S) / (LENGTH * STEP_S) for name in names]
    assert rounds == sorted(rounds)
    assert max(rounds[:2]) <= 1.5, "two slots, each drained once"
    assert max(rounds) <= 3


def test_requests_without_an_adapter_are_never_held_back(make: Callable) -> None:
    run = make({"adapter_wait": WAIT_S})
    run.keep_busy(range(1, 3), 1.0)
    run.ask(3)
    run.keep_busy(range(1, 3), WAIT_S + STEP_S)
    for _ in range(3):
        plain = run.ask(0, length=1)
        run.step()
        assert plain in run.started


def test_nobody_is_held_back_while_there_are_slots(make: Callable) -> None:
    """However long it waits, and for whatever else: here adapter 1 runs alone, and 8 requests are all that may."""
    run = make({"adapter_wait": WAIT_S})
    names = [run.ask(1, length=60) for _ in range(8)]
    later = [run.ask(1), run.ask(2)]
    for _ in range(60):
        run.step()
    assert all(name in run.started for name in names)
    run.step()
    assert all(name in run.started for name in later)


def test_priorities_are_kept(make: Callable) -> None:
    run = make({"adapter_wait": WAIT_S}, policy="priority")
    run.keep_busy(range(1, 3), 1.0)
    last = run.ask(3)
    run.keep_busy(range(1, 3), 10.0)
    assert last not in run.started
