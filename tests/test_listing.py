"""The series of adapters are bounded whatever their number, and an engine that takes its time holds nobody up."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Gauge, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families

from flora_vllm.plugin import listing
from flora_vllm.plugin.access import CURRENT, NOBODY, ScopedRequests, Tenant
from flora_vllm.plugin.listing import Reports
from flora_vllm.plugin.loads import LOAD_BOUNDS_S, Loads
from flora_vllm.plugin.series import exposition
from flora_vllm.plugin.traffic import MOST_NAMED, Published, Traffic


def _report(on_gpu: int, on_cpu: int, shown: int) -> dict[str, Any]:
    adapters = [
        {"id": i, "level": "gpu" if i < on_gpu else "cpu", "pinned": i == 0, "rank": 4}
        for i in range(min(shown, on_cpu))
    ]
    sizes = {"gpu": 100 * on_gpu, "cpu": 100 * on_cpu}
    turns = {"starved": 1, "drained": 3, "waiting": {"slot": 2, "loading": 1, "memory": 0}}
    return Loads().counts() | turns | {
        "slots": 8, "on_gpu": on_gpu, "on_cpu": on_cpu, "adapters": adapters, "bytes": sizes,
        "paths": {"stacked": 5, "modulated": 7},
    }  # fmt: skip


def _loaded(report: dict[str, Any], names: dict[int, str]) -> dict[tuple[str, ...], float]:
    families = {family.name: family for family in text_string_to_metric_families(exposition(report, names).decode())}
    samples = families["vllm:lora_adapter_loaded"].samples
    return {
        tuple(sample.labels[key] for key in ("adapter_name", "level", "pinned", "rank")): sample.value
        for sample in samples
    }


def test_the_rest_is_one_series_a_level():
    names = {i: f"tenant-{i}" for i in range(5000)}
    found = _loaded(_report(8, 5000, MOST_NAMED), names)
    assert len(found) == MOST_NAMED + 1
    assert found["tenant-0", "gpu", "true", "4"] == 1
    assert found["other", "cpu", "", ""] == 5000 - MOST_NAMED
    assert sum(found.values()) == 5000


def test_bytes_and_waiting_have_their_series():
    text = exposition(_report(2, 5, 5), {}).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["flora_adapter_bytes", "gpu"] == 200
    assert samples["flora_adapter_bytes", "cpu"] == 500
    assert samples["flora_adapters_starved",] == 1
    assert samples["flora_slots_drained_total",] == 3
    assert samples["flora_requests_waiting", "slot"] == 2
    assert samples["flora_segments_total", "modulated"] == 7
    assert samples["flora_adapter_lookups_total", "cpu", "miss"] == 0
    assert samples["flora_adapter_load_phase_seconds_total", "cut"] == 0


def test_adapters_without_a_name_here_are_in_the_rest():
    """A mix of one request, another tenant's, and one that a client called 'other'."""
    found = _loaded(_report(2, 4, 4), {0: "mine", 2: "other"})
    assert found == {("mine", "gpu", "true", "4"): 1, ("other", "gpu", "", ""): 1, ("other", "cpu", "", ""): 2}


def test_loads_are_counted_by_what_came_of_them():
    loads = Loads()
    for again in (False, True, True):
        with loads.counted(again=again):
            pass
    with pytest.raises(ValueError, match="refused"), loads.counted(again=False), loads.phase("check"):
        raise ValueError("refused")
    loads.look_up("gpu", True)
    counts = loads.counts()
    assert [name for name, seconds in counts["phase_s"].items() if seconds > 0] == ["check"]
    assert counts["lookups"] == {"gpu": {"hit": 1, "miss": 0}, "cpu": {"hit": 0, "miss": 0}}
    assert counts["results"] == {"loaded": 1, "reloaded": 2, "refused": 1}
    assert len(counts["loads_by_bound"]) == len(LOAD_BOUNDS_S) + 1
    assert sum(counts["loads_by_bound"]) == 3


def test_a_slow_engine_is_asked_once_and_waited_for_briefly(monkeypatch):
    monkeypatch.setattr(listing, "WAIT_S", 0.05)

    async def run() -> None:
        answers: list[asyncio.Future] = []

        def call(method: str, most: int | None) -> asyncio.Future:
            assert (method, most) == ("flora_adapters", None)
            answers.append(asyncio.get_running_loop().create_future())
            return answers[-1]

        engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call))
        reports = Reports(None)
        assert await asyncio.gather(*(reports.ask(engine) for _ in range(20))) == [None] * 20
        assert len(answers) == 1
        answers[0].set_result({"slots": 1})
        await asyncio.sleep(0)
        assert await reports.ask(engine, fresh_s=60) == {"slots": 1}
        assert len(answers) == 1
        assert await reports.ask(engine) == {"slots": 1}, "the last one, for want of another"
        assert len(answers) == 2

    asyncio.run(run())


def _app(answer: Any) -> FastAPI:
    """What vLLM's server is here: its state, and metrics as prometheus_client serves them."""

    async def call(_method: str, _most: int | None) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    app = FastAPI()
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "", registry=registry).set(3)
    Gauge("vllm:lora_requests_info", "", ["running"], registry=registry).labels("acme/a,other/b").set(1)
    app.mount("/metrics", make_asgi_app(registry=registry))
    app.state.engine_client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call))
    table = {
        name: SimpleNamespace(lora_int_id=i, lora_name=f"{name}@{'0' * 64}")
        for i, name in enumerate(("acme/a", "other/b", "acme/c"))
    }
    app.state.openai_serving_models = SimpleNamespace(lora_requests=ScopedRequests(table))
    listing.attach(app)
    return app


def _get(app: FastAPI, route: str, **headers: str) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(route, headers=headers, follow_redirects=True)

    return asyncio.run(get())


def _full_report() -> dict[str, Any]:
    report = _report(1, 2, 2)
    for adapter in report["adapters"]:
        adapter.update(family="FLORA", bytes=10, last_used=None)
    return report


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_series_are_added_however_prometheus_asks(accept):
    answer = _get(_app(_full_report()), "/metrics", accept=accept, **{"accept-encoding": "gzip"})
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families["vllm:num_requests_running"].samples[0].value == 3
    assert len(families["vllm:lora_adapter_loaded"].samples) == 2
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize(("method", "route"), [("GET", "/metrics/"), ("OPTIONS", "/metrics/"), ("GET", "/metrics/x")])
def test_vllms_own_series_name_nobodys_adapters_to_a_tenant(method: str, route: str) -> None:
    def ask() -> str:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(_app(_full_report()))
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, route)

        return asyncio.run(ask()).text

    assert "other/b" in ask()
    token = CURRENT.set(Tenant("acme", ("acme/*",)))
    try:
        told = ask()
    finally:
        CURRENT.reset(token)
    assert "other/b" not in told
    assert "vllm:num_requests_running 3.0" in told


def test_who_has_no_key_sees_all_only_where_nobody_needs_one() -> None:
    app = _app(_full_report())
    token = CURRENT.set(NOBODY)
    try:
        for options, sees in ((None, True), ({}, True), ({"adapter_acl": "acl"}, False)):
            config = {} if options is None else {"flora": options}
            app.state.engine_client.vllm_config = SimpleNamespace(additional_config=config)
            assert ("other/b" in _get(app, "/metrics").text) == sees
    finally:
        CURRENT.reset(token)


def test_a_dead_engine_leaves_vllms_own_series():
    answer = _get(_app(RuntimeError("dead")), "/metrics")
    assert answer.status_code == 200
    assert "vllm:num_requests_running 3.0" in answer.text
    assert "lora_adapter_loaded" not in answer.text


def test_a_tenant_sees_its_own_traffic_and_nothing_is_left_of_what_is_gone(monkeypatch):
    traffic = Traffic()
    monkeypatch.setattr(listing, "TRAFFIC", traffic)
    monkeypatch.setattr(listing, "PUBLISHED", Published(traffic))
    for name in ("acme/a", "other/b", "gone", "other"):
        traffic.of((name, "FLORA"), 5, now=0.0).prompt += 5
    app = _app(_full_report())
    series = "flora_prompt_tokens_total{"
    shown = [line.split('"')[1] for line in _get(app, "/metrics").text.splitlines() if line.startswith(series)]
    assert shown == ["acme/a", "other/b", "other"]
    app.state.openai_serving_models.lora_requests["other"] = SimpleNamespace(lora_int_id=9, lora_name="other")
    token = CURRENT.set(Tenant("acme", ("acme/*", "other")))
    try:
        shown = [line.split('"')[1] for line in _get(app, "/metrics").text.splitlines() if line.startswith(series)]
    finally:
        CURRENT.reset(token)
    assert shown == ["acme/a"]


def test_the_list_is_the_tenants_own_and_says_where_each_is():
    app = _app(_full_report())
    everything = _get(app, listing.ROUTE).json()["data"]
    assert [(entry["name"], entry["state"]) for entry in everything] == [
        ("acme/a", "resident"),
        ("acme/c", "registered"),
        ("other/b", "host"),
    ]
    assert everything[0]["digest"] == "0" * 64
    assert (everything[0]["rank"], everything[1]["rank"]) == (4, None)
    token = CURRENT.set(Tenant("acme", ("acme/*",)))
    try:
        assert [entry["name"] for entry in _get(app, listing.ROUTE).json()["data"]] == ["acme/a", "acme/c"]
        assert "other/b" not in _get(app, "/metrics").text
    finally:
        CURRENT.reset(token)


def test_the_list_waits_for_a_first_answer_and_says_so(monkeypatch):
    monkeypatch.setattr(listing, "WAIT_S", 0.05)
    app = _app(None)

    async def call(_method: str, _most: int | None) -> Any:
        await asyncio.sleep(60)

    app.state.engine_client.engine_core.call_utility_async = call
    answer = _get(app, listing.ROUTE)
    assert (answer.status_code, "ask again" in answer.text) == (503, True)
    assert int(answer.headers["Retry-After"]) >= 1
