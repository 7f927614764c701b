"""What schedulers around a fleet read: plain names, and a bounded number of series."""

import importlib

import pytest
from prometheus_client import CollectorRegistry, Gauge

from flora_vllm.plugin.identity import identity
from flora_vllm.plugin.published import FirstSeries, NewestSeries, name_events, name_metrics


def _gauge() -> tuple[CollectorRegistry, Gauge]:
    registry = CollectorRegistry()
    return registry, Gauge(
        "info", "", ["max_lora", "waiting_lora_adapters", "running_lora_adapters"], registry=registry
    )


def test_only_the_newest_series_are_kept() -> None:
    registry, gauge = _gauge()
    newest = NewestSeries(gauge, most=3)
    for turn in (0, 1, 2, 0, 3, 4):
        labels = {"running_lora_adapters": f"a{turn}", "waiting_lora_adapters": "", "max_lora": 2}
        newest.labels(**labels).set(turn)
    kept = [s for family in registry.collect() for s in family.samples]
    assert sorted(s.labels["running_lora_adapters"] for s in kept) == ["a0", "a3", "a4"]
    assert {s.labels["max_lora"] for s in kept} == {"2"}
    assert max(kept, key=lambda s: s.value).labels["running_lora_adapters"] == "a4"


def _adapters(registry: CollectorRegistry) -> list[tuple[str, str]]:
    samples = [s for family in registry.collect() for s in family.samples]
    return sorted((s.labels["running_lora_adapters"], s.labels["waiting_lora_adapters"]) for s in samples)


def test_series_that_last_are_few() -> None:
    registry, gauge = _gauge()
    first = FirstSeries(gauge, most=3)
    for running, waiting in (
        ("b,a", ""),
        ("a,b", ""),
        ("mix:a*0.7+b*0.3,a,mix:a*0.5", ""),
        ("a,mix:a*0.123", ""),
        ("chosen?a*0.7", "chosen?b*0.2"),
        ("late", ""),
        ("later", ""),
        ("late", "later"),
    ):
        first.labels(running_lora_adapters=running, waiting_lora_adapters=waiting, max_lora=2).set_to_current_time()
    assert _adapters(registry) == [
        ("a,b", ""),
        ("a,mix", ""),
        ("chosen", "chosen"),
        ("other", ""),
        ("other", "other"),
    ]
    assert {s.labels["max_lora"] for family in registry.collect() for s in family.samples} == {"2"}


@pytest.mark.parametrize(("several", "kind"), [(True, FirstSeries), (False, NewestSeries)])
def test_several_servers_keep_the_first_series(monkeypatch: pytest.MonkeyPatch, several: bool, kind: type) -> None:
    loggers = importlib.import_module("vllm.v1.metrics.loggers")
    state = importlib.import_module("vllm.v1.engine.output_processor").RequestState
    monkeypatch.setattr(
        loggers.PrometheusStatLogger, "__init__", lambda self, _config: setattr(self, "gauge_lora_info", _gauge()[1])
    )
    monkeypatch.setattr(state, "__init__", state.__init__)
    name_metrics()
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    if several:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "directory")
    assert isinstance(loggers.PrometheusStatLogger(None).gauge_lora_info, kind)


def test_events_carry_the_plain_name_and_the_engine_keeps_the_identity() -> None:
    from vllm.lora.request import LoRARequest

    known = identity("poems", "a" * 64)
    name_events()
    request = LoRARequest(known, 3, "somewhere")
    assert (request.name, request.lora_name) == ("poems", known)
    assert LoRARequest("plain", 4, "somewhere").name == "plain"
