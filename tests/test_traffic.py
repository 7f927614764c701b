"""Each token is counted once, in bounded series that never go back; why requests wait; which way products went."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.ops.terms import group_by_slot
from flora_vllm.plugin import prefetch, traffic, waiting
from flora_vllm.plugin.path_counts import PathCounts
from flora_vllm.plugin.traffic import CHOOSE_S, FIELDS, OTHER, Published, Traffic

PROMPT = FIELDS.index("prompt")


def _count(found: Traffic, name: str, tokens: int, now: float = 0.0) -> None:
    found.of((name, "LORA"), tokens, now).prompt += tokens


def test_the_busiest_have_series_and_every_token_is_counted_once() -> None:
    found = Traffic(most=3)
    before: dict[traffic.Key, float] = {}
    counted = seen = 0.0
    for turn in range(40):
        for i in range(20):
            tokens = 100 if i == (turn // 10) * 5 else 1 + i % 3  # one of them is busy for a while
            _count(found, f"a{i}", tokens, now=turn * CHOOSE_S / 2)
            counted += tokens
        now = {key: values[PROMPT] for key, values in found.values().items()}
        assert len(now) <= 3 + 1
        for key, value in now.items():
            # A scraper sees increases of series; one that it has not seen before began at 0.
            assert value >= before.get(key, 0.0), "a series went back while it was there"
            seen += value - before.get(key, 0.0)
        before = now
    busy = next(key for key in before if key[0] == "a15")
    assert before[busy] > 500
    # What a series counted between the last look and its end is lost to who looks, and nothing is seen twice.
    assert 0.9 * counted < seen <= counted


def test_an_idle_adapter_makes_room_for_a_single_busy_one() -> None:
    found = Traffic(most=1)
    _count(found, "idle", 10)
    _count(found, "busy", 10, now=1.0)
    assert {key[0] for key in found.values()} == {"idle", OTHER}
    for turn in range(8):
        _count(found, "busy", 10, now=turn * (CHOOSE_S + 1))
    assert {key[0] for key in found.values()} == {"busy", OTHER}


def test_an_adapter_that_was_chosen_and_then_silent_may_lose_its_place() -> None:
    found = Traffic(most=1)
    _count(found, "a", 1)
    _count(found, "b", 100, now=1.0)
    _count(found, "a", 1, now=CHOOSE_S + 1)  # b is chosen
    for turn in range(2, 12):
        _count(found, "a", 100, now=turn * (CHOOSE_S + 1))
    assert found.values()["a", "LORA"][PROMPT] > 100


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "MOST_REMEMBERED", 100)
    found = Traffic(most=2)
    for i in range(1000):
        _count(found, f"a{i}", 1)
    assert len(found._recent) <= 101
    assert found.values()[OTHER, "LORA"][PROMPT] == 998
    found.forget_all_but(lambda name: name == "a1")
    assert {key[0] for key in found.values()} == {"a1", OTHER}


def test_a_clients_adapter_named_other_is_among_the_others() -> None:
    found = Traffic(most=2)
    _count(found, OTHER, 3)
    _count(found, OTHER, 3, now=CHOOSE_S + 1)
    _count(found, "a", 1, now=2 * CHOOSE_S + 2)
    assert {key: values[PROMPT] for key, values in found.values().items()} == {(OTHER, "LORA"): 6, ("a", "LORA"): 1}


def test_servers_beside_each_other_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(traffic, "_PUBLISH_S", 0.01)
    own = Traffic()
    published = Published(own)
    published.begin()
    (tmp_path / "flora_traffic_0.json").write_text(json.dumps([["a", "LORA", 1, 2, 3, 4, 0.5], [OTHER, "", *[9] * 5]]))

    async def run() -> None:
        _count(own, "a", 10)
        published.note()
        published.note()
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert published.values() == {("a", "LORA"): [11, 2, 3, 4, 0.5], (OTHER, ""): [9] * 5}
    (written,) = [json.loads(f.read_text()) for f in tmp_path.glob("*.json") if f.name != "flora_traffic_0.json"]
    assert written == [["a", "LORA", 10, 0, 0, 0, 0.0]]
    assert not list(tmp_path.glob("*.new"))


def _request(adapter: int, **more: Any) -> Any:
    lora = SimpleNamespace(lora_int_id=adapter) if adapter else None
    return SimpleNamespace(lora_request=lora, status=SimpleNamespace(name="WAITING"), num_computed_tokens=0, **more)


def test_requests_wait_for_a_slot_a_load_or_memory() -> None:
    loading = prefetch.Loading(SimpleNamespace())
    loading._held = dict.fromkeys((1, 2, 3), "")
    loading._loads = {
        0: prefetch._Load(SimpleNamespace(lora_int_id=4), again=True),
        1: prefetch._Load(SimpleNamespace(lora_int_id=5), again=True, lacks_room=True),
    }
    waiting_ones = [_request(i) for i in (0, 1, 2, 3, 3, 4, 5, 6)]
    scheduler = SimpleNamespace(running=[_request(1), _request(2)], waiting=waiting_ones, _flora_loading=loading)
    # 6 has no load of its own yet: it waits for the one that waits for room.
    assert waiting.counts(scheduler, slots=2) == {"slot": 2, "loading": 1, "memory": 2}
    assert waiting.counts(scheduler, slots=3) == {"slot": 0, "loading": 1, "memory": 2}
    alone = SimpleNamespace(running=[_request(1)], waiting=[_request(2)])
    assert waiting.counts(alone, slots=1) == {"slot": 1, "loading": 0, "memory": 0}


def test_segments_are_counted_by_the_way_their_products_take() -> None:
    counts = PathCounts()
    counts.write_slot(1, {4: 10, 100: 2})
    counts.write_slot(2, {})
    counts.count(group_by_slot(torch.tensor([0] * 5 + [1] * 4 + [2] * 50)))
    assert (counts.stacked, counts.modulated) == (2, 10)
    counts.count(group_by_slot([1] * 3))
    counts.count(None)
    assert (counts.stacked, counts.modulated) == (14, 10)
    counts.write_slot(1, {})
    counts.count(group_by_slot([1] * 3))
    assert (counts.stacked, counts.modulated) == (14, 10)
