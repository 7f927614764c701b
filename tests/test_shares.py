"""vLLM's own scheduler, flooded by one tenant: when the others' requests run."""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_support import LENGTH, STEP_S, Clock, Run

from flora_vllm.errors import ConfigError
from flora_vllm.plugin import access, gate, shares, turns
from flora_vllm.plugin.options import FloraOptions

# vLLM's config imports warn about others' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

FLOOD = 60
WAIT_S = 2.0
ONE_ENDS_S = (LENGTH + 1) * STEP_S  # until one that runs is done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns, "time", made)
    return made


@pytest.fixture
def make(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[..., Run]:
    """`make(how)`: a scheduler whose engine was given `--adapter-shares how`; None: without FLoRA."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("__init__", "schedule", "_handle_blocked_waiting_request"):
        monkeypatch.setattr(Scheduler, name, inspect.unwrap(getattr(Scheduler, name)))
    turns.install()
    shares.install()

    def make_run(how: str | None, **more: object) -> Run:
        options = None if how is None else {"adapter_shares": how, "adapter_wait": WAIT_S}
        return Run(tiny_model("llama"), options, clock, **more)

    return make_run


def flood(run: Run, count: int = FLOOD) -> list[str]:
    """Far more than the 8 requests that may run, and then some steps."""
    names = [run.ask(1, tenant="loud/", key="loud") for _ in range(count)]
    for _ in range(3):
        run.step()
    return names


def waited_s(run: Run, name: str, steps: int = 400) -> float:
    asked_s = run.clock.now
    for _ in range(steps):
        run.step()
        if name in run.started:
            return run.started[name] - asked_s
    raise AssertionError(f"{name} never ran")


@pytest.mark.parametrize("how", [None, "none"])
def test_without_shares_a_flood_pushes_everybody_back(make: Callable[..., Run], how: str | None) -> None:
    run = make(how)
    assert type(run.scheduler.waiting).__name__ == "FCFSRequestQueue"
    flood(run)
    assert waited_s(run, run.ask(2, tenant="quiet/")) >= (FLOOD // 8 - 1) * LENGTH * STEP_S


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("how", ["prefix", "key"])
def test_a_quiet_tenant_waits_for_one_request_to_end(make: Callable[..., Run], how: str, is_async: bool) -> None:
    run = make(how, is_async=is_async)
    loud = flood(run)
    for _ in range(3):
        assert waited_s(run, run.ask(2, tenant="quiet/", key="quiet")) <= ONE_ENDS_S + is_async * STEP_S
    for _ in range(400):
        run.step()
    assert [run.done[name] for name in loud] == [LENGTH] * FLOOD, "and the flood is served too"


def test_requests_without_an_adapter_are_one_tenant_or_their_keys(make: Callable[..., Run]) -> None:
    run = make("prefix")
    flood(run)
    plain = [run.ask(0, key=key) for key in ("a", "b", "a")]
    assert waited_s(run, plain[0]) <= ONE_ENDS_S
    run = make("key")
    for _ in range(FLOOD):
        run.ask(0, key="loud")
    run.step()
    assert waited_s(run, run.ask(0, key="quiet")) <= ONE_ENDS_S


def test_places_that_are_free_at_once_are_shared(make: Callable[..., Run]) -> None:
    run = make("key")
    for key in ("first", "second"):
        for _ in range(20):
            run.ask(0, key=key)
    run.step()
    assert Counter(map(shares.by_key, run.scheduler.running)) == {
        "first": 4,
        "second": 4,
    }


def test_among_several_tenants_it_waits_for_one_end_each(make: Callable[..., Run]) -> None:
    run = make("key")
    for tenant in "abcde":
        for _ in range(20):
            run.ask(0, key=tenant)
    for _ in range(LENGTH * 3):
        run.step()
    assert waited_s(run, run.ask(0, key="quiet")) <= ONE_ENDS_S


def test_tenants_get_as_many_tokens_whatever_their_requests_are(make: Callable[..., Run]) -> None:
    run = make("key")
    long = [run.ask(0, 40, key="long") for _ in range(40)]
    short = [run.ask(0, 5, key="short", prompt=5) for _ in range(200)]
    for _ in range(150):
        run.step()
    tokens = {"long": sum(run.done[name] + 3 for name in long if name in run.started)}
    tokens["short"] = sum(run.done[name] + 5 for name in short if name in run.started)
    # Apart by at most what the 8 that run may still take.
    assert abs(tokens["long"] - tokens["short"]) <= 8 * 43


def test_nobody_saves_up(make: Callable[..., Run]) -> None:
    """Who paused for long, and floods then, has no more than his share from then on."""
    run = make("key")
    run.ask(0, key="late")
    loud = [run.ask(0, key="loud") for _ in range(200)]
    for _ in range(100):
        run.step()
    late = [run.ask(0, key="late") for _ in range(200)]
    before = sum(run.done[name] for name in loud)
    for _ in range(100):
        run.step()
    served = sum(run.done[name] for name in loud) - before, sum(run.done[name] for name in late)
    assert min(served) / sum(served) >= 0.4


def test_who_had_an_idle_engine_to_himself_is_not_made_to_pay(make: Callable[..., Run]) -> None:
    run = make("key")
    for _ in range(30):  # one at a time: nobody waits
        run.ask(0, key="early")
        for _ in range(LENGTH + 2):
            run.step()
    names = {key: [run.ask(0, key=key) for _ in range(100)] for key in ("late", "early")}
    for _ in range(100):
        run.step()
    served = [sum(run.done[name] for name in names[key]) for key in names]
    assert min(served) / sum(served) >= 0.4


def test_requests_that_lost_their_memory_come_back(make: Callable[..., Run]) -> None:
    """8 requests of up to 43 tokens want 3 blocks of 16 each; there are 11."""
    run = make("key", blocks=12)
    names = [run.ask(0, 40, key=key) for key in ("a", "b") for _ in range(6)]
    requests = [run.scheduler.requests[name] for name in names]
    for _ in range(1000):
        run.step()
    assert sum(request.num_preemptions for request in requests) > 0
    assert [run.done[name] for name in names] == [40] * 12
    assert not run.scheduler.waiting
    assert not run.scheduler.requests


def test_many_adapters_of_one_tenant_do_not_take_all_turns_at_slots(make: Callable[..., Run]) -> None:
    """20 adapters that all waited too long before, for one slot: another tenant's waits its own wait, and one slot."""
    run = make("prefix", slots=1)
    for adapter in range(1, 21):
        run.ask(adapter, tenant="loud/")
    for _ in range(round(WAIT_S / STEP_S) + LENGTH):
        run.step()
    assert waited_s(run, run.ask(99, tenant="quiet/")) <= WAIT_S + 2 * ONE_ENDS_S


def test_what_is_passed_by_costs_its_tenant_nothing(make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that cannot run yet are looked at in every step; the same tenant's that can still get their half."""
    from vllm.v1.core.sched.scheduler import Scheduler

    ready = Scheduler._handle_blocked_waiting_request
    monkeypatch.setattr(
        Scheduler,
        "_handle_blocked_waiting_request",
        lambda self, request: not request.request_id.startswith("9") and ready(self, request),
    )
    run = make("key")
    blocked = [run.ask(9, key="held", prompt=40) for _ in range(300)]
    held, other = ([run.ask(0, key=key) for _ in range(100)] for key in ("held", "other"))
    for _ in range(100):
        run.step()
    served = sum(run.done[name] for name in held), sum(run.done[name] for name in other)
    assert min(served) / sum(served) >= 0.4
    assert not any(name in run.started for name in blocked)
    assert len(run.scheduler.waiting) == 300 + sum(name not in run.started for name in held + other)


def test_priorities_alone_count(make: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "flora_vllm")
    run = make("key", policy="priority")
    assert type(run.scheduler.waiting).__name__ == "PriorityRequestQueue"
    assert "priorities alone count" in caplog.text
    for _ in range(FLOOD):
        run.ask(0, key="loud", priority=0)
    last = run.ask(0, key="quiet", priority=1)
    assert waited_s(run, last) >= (FLOOD // 8 - 1) * LENGTH * STEP_S


def test_ended_requests_leave_the_queue(make: Callable[..., Run]) -> None:
    from vllm.v1.request import RequestStatus

    run = make("key")
    names = flood(run)
    kept = run.ask(0, key="quiet")
    run.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    assert [request.request_id for request in run.scheduler.waiting] == [kept]
    run.scheduler.finish_requests(kept, RequestStatus.FINISHED_ABORTED)
    assert not run.scheduler.waiting
    assert len(run.scheduler.waiting) == 0
    run.step()


def test_accounts_are_bounded() -> None:
    queue = shares.FairQueue(lambda request: request.share)
    for number in range(3 * shares._MOST_KEPT):
        request = SimpleNamespace(share=f"{number}", status=SimpleNamespace(name="WAITING"), num_tokens=1)
        request.num_computed_tokens, request.arrival_time = 0, float(number)
        queue.add_request(request)
        assert queue.peek_request() is queue.pop_request()
        request.status.name = "RUNNING"
        queue.charge([(request, 1)])
    assert len(queue._accounts) <= shares._MOST_KEPT + 1
    # Of a tenant that is forgotten something may still run, and lose its memory.
    preempted = SimpleNamespace(share="0", status=SimpleNamespace(name="PREEMPTED"))
    assert "0" not in queue._accounts
    queue.prepend_request(preempted)
    queue.charge([])
    assert queue.peek_request() is preempted


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        (f"acme/poems@{'0' * 64}", "acme"),
        ("acme/a/b", "acme"),
        (f"poems@{'0' * 64}", "poems"),
        (f"mix:acme/poems*0.7+other/legal*0.3@{'0' * 64}", "acme"),
        ("mix:poems*0.7+legal*0.3", "poems"),
        ("mix:named", "mix:named"),
    ],
)
def test_whose_an_adapter_is(name: str, prefix: str) -> None:
    assert shares.prefix_of(name) == prefix


def test_a_key_is_its_tenant_and_each_of_the_operators_keys_its_own(tmp_path: Path) -> None:
    rules = access.AccessRules(["one", "two"], None, has_root=False)
    keys = rules.keys()
    found = [keys.share(keys.holder(f"Bearer {key}"), f"Bearer {key}") for key in ("one", "two", "two", "three")]
    assert len(set(found)) == 3
    assert found[1] == found[2]
    assert found[3] == "", "an unknown key"
    acme = access.Tenant("acme")
    shared = access.Keys({b"1": acme, b"2": acme, **keys.tenants})
    assert shared.share(acme, "Bearer a") == shared.share(acme, "Bearer b") == "tenant acme"
    assert access.Keys({}).share(access.OPERATOR, "Bearer whatever a client says") == ""


def test_without_keys_shares_by_key_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import FastAPI
    from vllm.entrypoints.launchers import app as launcher

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    stock = inspect.unwrap(launcher.init_entrypoints_middleware)
    monkeypatch.setattr(launcher, "init_entrypoints_middleware", lambda *_: None)
    gate.install()
    args = SimpleNamespace(api_key=None, enable_flora=True, additional_config={"flora": {"adapter_shares": "key"}})
    with pytest.raises(ConfigError, match="there are no keys; give --api-key or --adapter-acl"):
        launcher.init_entrypoints_middleware(args, FastAPI(), ())
    assert stock is not launcher.init_entrypoints_middleware


def test_the_server_writes_the_share_on_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a realtime session's input is one, and none of those gets an id or headers of its own from vLLM."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.setattr(AsyncLLM, "_add_request", inspect.unwrap(AsyncLLM._add_request))
    shares.install_request_side()
    added: list[EngineCoreRequest] = []

    async def add(request: EngineCoreRequest) -> None:
        added.append(request)

    def made(request_id: str, trace_headers: dict[str, str] | None, **_: object) -> EngineCoreRequest:
        request = EngineCoreRequest(request_id, [1], None, None, None, 0.0, None, None, None)
        request.trace_headers = trace_headers
        return request

    engine: Any = object.__new__(AsyncLLM)
    engine.vllm_config = SimpleNamespace(
        additional_config={"flora": {"adapter_shares": "key"}}, is_mm_encoder_only=False
    )
    engine.output_processor = SimpleNamespace(has_request=lambda _: True, add_request=lambda *_: None)
    engine.engine_core = SimpleNamespace(add_request_async=add)
    engine.log_requests = False
    engine.model_config = SimpleNamespace(is_encoder_decoder=False, is_diffusion=False)
    engine.input_processor = SimpleNamespace(process_inputs=made, assign_request_id=lambda _: None)
    engine.get_supported_tasks = lambda: asyncio.sleep(0, ())
    engine._run_output_handler = lambda: None

    async def parts() -> AsyncIterator[SimpleNamespace]:
        for _ in range(2):
            yield SimpleNamespace(sampling_params=None, prompt={"prompt_token_ids": [1]})

    async def ask() -> None:
        access.SHARE.set("tenant acme")
        sent = {"traceparent": "00-1-2-03", "x-flora-share": "somebody else's"}
        await engine._add_request(made("r", sent), None, None, 0, None)
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        queue = await engine._add_streaming_input_request("s", parts(), params)
        await queue._input_stream_task

    asyncio.run(ask())
    assert added[0].trace_headers == {"traceparent": "00-1-2-03", "x-flora-share": "tenant acme"}
    assert [shares.by_key(request) for request in added] == ["tenant acme"] * 4


def test_the_option_is_one_of_three() -> None:
    assert FloraOptions().adapter_shares == "none"
    with pytest.raises(ConfigError, match="one of none, prefix, key"):
        FloraOptions(adapter_shares="weights")
