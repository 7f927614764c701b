"""What schedulers around a fleet read: plain names, and a bounded number of series."""

from prometheus_client import CollectorRegistry, Gauge

from flora_vllm.plugin.identity import identity
from flora_vllm.plugin.published import NewestSeries, name_events


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


def test_events_carry_the_plain_name_and_the_engine_keeps_the_identity() -> None:
    from vllm.lora.request import LoRARequest

    known = identity("poems", "a" * 64)
    name_events()
    request = LoRARequest(known, 3, "somewhere")
    assert (request.name, request.lora_name) == ("poems", known)
    assert LoRARequest("plain", 4, "somewhere").name == "plain"
