"""An ingress' sums of its replicas never go back, its gauges say what can be said, its list has each adapter once."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flora_vllm.cluster.merged import GONE_S, MergedMetrics, merged_adapters
from flora_vllm.cluster.store import Entry
from flora_vllm.cluster.vllm_engine import VllmEngineAdapters
from flora_vllm.plugin import listing
from flora_vllm.plugin.loads import Loads
from flora_vllm.plugin.traffic import Published, Traffic


def _told(tokens: float, running: float, usage: float, latencies: tuple[float, ...] = ()) -> str:
    registry = CollectorRegistry()
    Counter("vllm:generation_tokens", "", ["model_name"], registry=registry).labels("smol").inc(tokens)
    Counter("flora_generation_tokens", "", ["adapter_name", "family"], registry=registry).labels("a", "LORA").inc(1)
    Gauge("vllm:num_requests_running", "", registry=registry).set(running)
    Gauge("vllm:kv_cache_usage_perc", "", registry=registry).set(usage)
    Gauge("python_info", "", registry=registry).set(1)
    histogram = Histogram("vllm:time_to_first_token_seconds", "", buckets=(0.1, 1.0), registry=registry)
    for latency in latencies:
        histogram.observe(latency)
    return generate_latest(registry).decode()


def _samples(text: bytes) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, *(v for _, v in sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_counts_are_summed_and_ratios_stand_alone() -> None:
    merged = MergedMetrics()
    answers = [("smol", "x", _told(10, 1, 0.5, (0.05, 0.5))), ("smol", "y", _told(5, 2, 0.25, (0.5,)))]
    found = _samples(merged.merge(answers))
    assert found["vllm:generation_tokens_total", "smol"] == 15
    assert found["flora_generation_tokens_total", "a", "LORA", "smol"] == 2
    assert found["vllm:num_requests_running", "smol"] == 3
    assert (found["vllm:kv_cache_usage_perc", "smol", "x"], found["vllm:kv_cache_usage_perc", "smol", "y"]) == (
        0.5,
        0.25,
    )
    assert found["vllm:time_to_first_token_seconds_count", "smol"] == 3
    assert found["vllm:time_to_first_token_seconds_bucket", "0.1", "smol"] == 1
    assert not any(key[0].startswith("python") or key[0].endswith("_created") for key in found)


def test_two_base_models_are_told_apart() -> None:
    found = _samples(MergedMetrics().merge([("smol", "x", _told(1, 1, 0)), ("tiny", "y", _told(1, 5, 0))]))
    assert found["flora_generation_tokens_total", "a", "LORA", "tiny"] == 1
    assert (found["vllm:num_requests_running", "smol"], found["vllm:num_requests_running", "tiny"]) == (1, 5)


def test_no_sum_goes_back_when_a_replica_goes_pauses_or_begins_again() -> None:
    merged, key = MergedMetrics(), ("vllm:generation_tokens_total", "smol")

    def total(**replicas: float) -> float:
        return _samples(merged.merge([("smol", name, _told(tokens, 0, 0)) for name, tokens in replicas.items()]))[key]

    assert total(x=10, y=5) == 15
    assert total(x=12) == 17, "y does not answer"
    assert total(x=12, y=9) == 21, "what it counted meanwhile"
    assert total(y=9, z=1) == 22, "x is gone, z is new"
    assert total(y=2, z=1) == 24, "y began again at 0"


def test_who_does_not_answer_keeps_its_counts_and_has_no_gauges() -> None:
    merged, key = MergedMetrics(), ("vllm:generation_tokens_total", "smol")
    merged.merge([("smol", "x", _told(10, 1, 0.5))])
    found = _samples(merged.merge([]))
    assert found[key] == 10, "a scrape without its series would look like a new begin"
    assert not any("running" in name or "usage" in name for name, *_ in found)
    assert _samples(merged.merge([("smol", "x", _told(11, 1, 0.5))]))[key] == 11


def test_series_go_with_the_last_replica_that_has_them() -> None:
    merged = MergedMetrics()
    merged.merge([("smol", "x", _told(1, 0, 0)), ("tiny", "y", _told(1, 0, 0))])
    merged._last["y"] = (-GONE_S, merged._last["y"][1])
    found = _samples(merged.merge([("smol", "x", _told(1, 0, 0))]))
    assert not any("tiny" in key for key in found)
    assert not any("tiny" in str(series) for series in merged._sums)


def _copy(entry: Entry, state: str, last_used: float | None = None, pinned: bool = False) -> dict[str, Any]:
    known = state != "registered"
    return {
        "name": entry.id, "state": state, "digest": "0123", "family": "LORA" if known else None,
        "rank": 8 if known else None, "bytes": 100 if known else None, "pinned": pinned if known else None,
        "last_used": last_used,
    }  # fmt: skip


def test_adapters_are_listed_once_with_every_place() -> None:
    a, b, c = (Entry(name, "v1", f"/adapters/{name}", 50, 8) for name in "abc")
    catalogue = [("a", "smol", a), ("smol:b", "smol", b), ("tiny:b", "tiny", b), ("c", "smol", c)]
    answers = [
        ("smol", "x", [_copy(a, "host", 5.0), _copy(b, "registered")]),
        ("smol", "y", [_copy(a, "resident", 7.0, pinned=True)]),
    ]
    found = {entry["name"]: entry for entry in merged_adapters(catalogue, answers)}
    assert list(found) == ["a", "smol:b", "tiny:b", "c"]
    assert found["a"]["state"] == "resident"
    assert found["a"]["replicas"] == {"x": "host", "y": "resident"}
    assert (found["a"]["last_used"], found["a"]["pinned"], found["a"]["bytes"]) == (7.0, True, 100)
    assert (found["smol:b"]["state"], found["smol:b"]["replicas"]) == ("registered", {"x": "registered"})
    assert (found["tiny:b"]["parent"], found["tiny:b"]["replicas"]) == ("tiny", {})
    assert (found["c"]["state"], found["c"]["family"], found["c"]["pinned"]) == ("registered", None, None)


def test_a_replica_tells_its_engine_by_the_names_that_clients_use(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic()
    monkeypatch.setattr(listing, "TRAFFIC", traffic)
    monkeypatch.setattr(listing, "PUBLISHED", Published(traffic))
    traffic.of(("a", "LORA"), 3, now=0.0).generation += 3
    traffic.of(("gone", "LORA"), 3, now=0.0).generation += 3
    known = {"id": 1, "level": "gpu", "pinned": False, "family": "LORA", "rank": 8, "bytes": 10, "last_used": 5.0}
    counts = {"starved": 0, "drained": 0, "waiting": {}, "paths": {}, "bytes": {"gpu": 10, "cpu": 10}}
    report = Loads().counts() | counts | {"slots": 2, "on_gpu": 1, "on_cpu": 1, "adapters": [known]}

    async def call(_method: str, _most: int | None) -> Any:
        return report

    models = SimpleNamespace(lora_requests={"a@v1": SimpleNamespace(lora_int_id=1, lora_name=f"a@{'0' * 64}")})
    client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call))

    async def ask() -> tuple[str, list[dict[str, Any]]]:
        adapters = VllmEngineAdapters(SimpleNamespace(_engine_client=client, _oai_models=models))
        return await adapters.metrics(), await adapters.adapters()

    text, listed = asyncio.run(ask())
    found = _samples(MergedMetrics().merge([("smol", "x", text)]))
    assert found["flora_generation_tokens_total", "a", "LORA", "smol"] == 3
    assert found["vllm:lora_adapter_loaded", "a", "gpu", "smol", "false", "8"] == 1
    assert not any("gone" in key for key in found)
    (entry,) = merged_adapters([("a", "smol", Entry("a", "v1", "/a", 50, 8))], [("smol", "x", listed)])
    assert (entry["name"], entry["state"], entry["digest"], entry["rank"]) == ("a", "resident", "0" * 64, 8)
