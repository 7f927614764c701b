"""What the workers' steps are wrapped in."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_support import Clock, Run

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


@pytest.mark.parametrize("fault_of", [frozenset({1}), None])
def test_a_failed_steps_requests_fail_with_those_that_were_given_its_blocks(fault_of, tiny_model, monkeypatch) -> None:
    """The next step may be made before a step is known to have failed: its requests read what was never written."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from flora_vllm.plugin import step_faults

    monkeypatch.setattr(Scheduler, "update_from_output", inspect.unwrap(Scheduler.update_from_output))
    step_faults.install_scheduler_side()
    run = Run(tiny_model("llama"), None, Clock(), slots=2, is_async=True, is_caching=True)
    running = run.ask(1, prompt=3)
    run.step()
    others = [run.ask(adapter, prompt=40) for adapter in (1, 2, 0)]
    run.step()
    run.fault = step_faults.StepFault("gone", fault_of)
    followers = [run.ask(adapter, prompt=40) for adapter in (1, 2, 0)]
    run.step()
    wrong = 1 if fault_of else 2
    assert run.failed == {running, *others[:wrong], *followers[:wrong]}
    assert [run.scheduled[name] for name in followers] == [8, 8, 8], "the followers were to share blocks"
    assert not run.scheduler.requests.keys() & run.failed
    again = run.ask(1, prompt=40)
    run.step()
    assert run.scheduled[again] == 40, "what was never written is not found any more"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("leaves", ["aborted", "preempted"])
def test_what_a_request_that_has_left_was_to_fill_is_not_found(leaves, is_async, tiny_model, monkeypatch) -> None:
    """Its blocks are free when the step is known to have failed, and nobody knows any more which they were."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    from flora_vllm.plugin import step_faults

    monkeypatch.setattr(Scheduler, "update_from_output", inspect.unwrap(Scheduler.update_from_output))
    step_faults.install_scheduler_side()
    run = Run(tiny_model("llama"), None, Clock(), slots=2, is_async=is_async, is_caching=True)
    other = run.ask(2, prompt=40)
    run.step()
    name = run.ask(1, prompt=40)
    scheduled = run.scheduler.schedule()
    if leaves == "aborted":
        run.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
    else:  # as by a step that lacks blocks
        request = run.scheduler.requests[name]
        run.scheduler.running.remove(request)
        run.scheduler._preempt_request(request, 0.0)
    follower = None
    if is_async:  # and the next step is made, with blocks that it was to fill
        run._answer(run._undone.popleft())
        follower = run.ask(1, prompt=40)
        run._undone.append(run.scheduler.schedule())
        assert run._undone[0].num_scheduled_tokens[follower] == 8, "the follower was to share blocks"
    run.fault = step_faults.StepFault("gone", frozenset({1}))
    run._answer(scheduled)
    ended = {follower} if leaves == "aborted" else {name, follower}
    assert run.failed == ended - {None}
    assert other in run.scheduler.requests
    again, same = run.ask(1, prompt=40), run.ask(2, prompt=40)
    run.step()
    assert run.scheduled[again] == 40, "what was never written is not found any more"
    assert run.scheduled[same] == 8, "what others have is"


def test_faults_of_several_stages_are_one() -> None:
    from flora_vllm.plugin.step_faults import StepFault, _joined

    first, second = StepFault("gone", frozenset({1})), StepFault("lost", frozenset({2}))
    assert _joined([None, None]) is None
    assert _joined([first, None, second, first]) == StepFault("gone; lost", frozenset({1, 2}))
    assert _joined([first, StepFault("bypassed")]) == StepFault("gone; bypassed"), "of any adapter"


@pytest.mark.parametrize("can", [True, False])
def test_what_a_failed_step_has_stored_elsewhere_is_forgotten_or_said_to_be_there(
    can, tiny_model, monkeypatch, caplog
) -> None:
    """vLLM's connector for offloading; and one that cannot be emptied."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.core.sched.scheduler import Scheduler

    from flora_vllm.plugin import step_faults

    monkeypatch.setattr(Scheduler, "update_from_output", inspect.unwrap(Scheduler.update_from_output))
    step_faults.install_scheduler_side()
    emptied, reset = [], OffloadingConnector.reset_cache
    monkeypatch.setattr(OffloadingConnector, "reset_cache", lambda self: emptied.append(reset(self)) or True)
    if not can:
        monkeypatch.setattr(OffloadingConnector, "reset_cache", KVConnectorBase_V1.reset_cache)
    stored = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": 1 << 20}
    )
    run = Run(tiny_model("llama"), None, Clock(), slots=2, is_caching=True, kv_transfer=stored)
    name = run.ask(1, prompt=40)
    run.fault = step_faults.StepFault("gone", frozenset({1}))
    run.step()
    assert run.failed == {name}
    assert emptied == [True] * can
    assert ("OffloadingConnector cannot be emptied" in caplog.text) == (not can)
    followers = run.scheduler.connector.connector_scheduler._req_status
    assert (name in followers) == (not can), "else its blocks are stored with the next step"
