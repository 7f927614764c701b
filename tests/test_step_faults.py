"""What the workers' steps are wrapped in."""

from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.pacing import Turns

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn


@pytest.mark.parametrize("has_adapters", [True, False])
def test_a_step_without_requests_is_a_step_too(has_adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of idle data-parallel ranks: no load's base call may run beside one."""
    from vllm.v1.worker.gpu_worker import Worker

    from flora_vllm.plugin import step_faults

    turns, during = Turns(), []
    for name in ("execute_model", "sample_tokens"):
        monkeypatch.setattr(Worker, name, getattr(Worker, name))
    monkeypatch.setattr(Worker, "execute_dummy_batch", lambda _: during.append(turns.between_steps().locked()))
    step_faults.note_on_outputs.__wrapped__()
    worker: Any = object.__new__(Worker)
    manager = SimpleNamespace(idle_step=turns.step) if has_adapters else None
    worker.model_runner = SimpleNamespace(lora_manager=manager)
    worker.execute_dummy_batch()
    assert during == [has_adapters]
    assert turns.steps_run() == has_adapters
    assert not turns.between_steps().locked()
