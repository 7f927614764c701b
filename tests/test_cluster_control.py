"""The parts of the cluster that need no Ray: routing, demand, controller."""

import asyncio
import random
import time

import numpy as np
import pytest
from cluster_support import make_gate, minimal, write_adapter

from flora_vllm.cluster.config import ModelConfig, StoreConfig, TimingConfig, parse, to_data
from flora_vllm.cluster.controller import BROKEN, PlacementController
from flora_vllm.cluster.memory import NoRoomError, NotLoadedError
from flora_vllm.cluster.messages import Report
from flora_vllm.cluster.rules import routing, scaling
from flora_vllm.cluster.rules.demand import Demand
from flora_vllm.cluster.store import Entry, StaleVersionError, StoreError
from flora_vllm.cluster.streams import LostError
from flora_vllm.cluster.view import CatalogueView
from flora_vllm.errors import ConfigError

# ---- routing


def choose(warm, queue, held=None, count=6, **options):
    keys = np.array([routing.key_of(f"r{i}") for i in range(count)], dtype=np.uint64)
    held = held or [0] * count
    return routing.choose(
        routing.key_of("poems"),
        warm,
        keys,
        lambda r: queue[r],
        lambda r: held[r],
        routing.RoutingOptions(**options),
        random.Random(0),
    )


def test_warm_and_short_first():
    assert choose([1, 2], [0, 5, 3, 0, 0, 0])[0] == 2


def test_spill_only_when_warm_is_deep_and_cold_is_clearly_better():
    assert choose([1], [6, 10, 6, 6, 6, 6])[0] == 1
    assert choose([1], [0, 10, 0, 0, 0, 0])[0] != 1
    assert choose([1], [0, 7, 0, 0, 0, 0])[0] == 1


def test_ingresses_agree_on_the_home_and_leaving_moves_only_its_own():
    keys = np.array([routing.key_of(f"r{i}") for i in range(20)], dtype=np.uint64)
    homes = [routing.cold_order(routing.key_of(f"a{a}"), keys, [], 1)[0] for a in range(500)]
    counts = np.bincount(homes, minlength=20)
    # 500 adapters on 20 replicas: mean 25, standard deviation 4.9; 6 of them cover 20 tries amply.
    assert counts.min() > 0
    assert counts.max() < 25 + 6 * 4.9
    fewer = [routing.cold_order(routing.key_of(f"a{a}"), keys[:-1], [], 1)[0] for a in range(500)]
    assert all(f == h for f, h in zip(fewer, homes, strict=True) if h != 19)


def test_emptiest_of_the_homes_and_no_replica():
    first = choose([], [0] * 6, choices=6)
    assert choose([], [0] * 6, held=[0 if r == first[3] else 5 for r in range(6)], choices=6)[0] == first[3]
    assert choose([], [], count=0) == []


# ---- demand and scaling


def test_demand_measures_requests_in_flight():
    demand = Demand()
    demand.level(0.0, 2)
    for t in range(1, 601):
        demand.observe([0, 1], [4.0, 0.25])
        level = demand.level(float(t), 2)
    # After ten slow half-lives a constant load shows within the sampling period's error (1 s of 87 s).
    assert level[0] == pytest.approx(4.0, rel=0.1)
    assert level[1] == pytest.approx(0.25, rel=0.1)


def test_a_rush_shows_within_seconds_and_one_request_does_not():
    demand = Demand()
    for t in range(120):
        demand.level(float(t), 2)
    demand.observe([1], [2.0])
    for t in range(120, 126):
        demand.observe([0], [10.0])
        level = demand.level(float(t), 2)
    assert level[0] > 4
    assert level[1] < 0.1


def test_new_version_inherits_demand():
    demand = Demand()
    demand.level(0.0, 2)
    demand.observe([0], [5.0])
    demand.move(0, 1)
    level = demand.level(1.0, 2)
    assert level[0] == 0
    assert level[1] > 0


def test_scaling_by_requests_and_adapters():
    assert scaling.replicas_needed(17, 8, 0) == 3
    assert scaling.replicas_needed(1, 8, 4) == 4


# ---- controller and view


def make_controller(root, lost_s=60.0, **model):
    data = to_data(ModelConfig("base", "/m", adapters=(str(root),), **model))
    timing = TimingConfig(sync_s=0.05, lost_s=lost_s, plan_s=0.05, settle_s=30.0)
    controller = PlacementController(data, to_data(StoreConfig(scan_s=0.05)), to_data(timing))
    controller._export = lambda moves: None  # type: ignore[method-assign]  # metrics need a Ray worker
    return controller


def report(replica, resident=(), **more):
    fields = {"node": replica, "slots": 4, "nbytes": 10**9, "max_rank": 16, "is_warming": False}
    return Report(replica, resident=tuple(resident), **{**fields, **more})


async def until(what, seconds=30.0):
    """Waits for `await what()` to be true, or something else that is; returns it. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := await what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.02)
    return found


async def settle(controller, *replicas, what):
    """Replicas sync, each with what it was told to hold, until `what(orders)` holds; the last orders of each."""
    orders = {}

    async def sync_all():
        for r in replicas:
            known = orders.get(r)
            resident = () if known is None or known.wanted is None else [e.id for e in known.wanted]
            orders[r] = await controller.sync(report(r, resident))
        return all(o.wanted is not None for o in orders.values()) and what(orders)

    await until(sync_all)
    return orders


def test_controller_places_repairs_and_recovers(tmp_path):
    write_adapter(tmp_path, "poems")
    asked = {"adapter_options": parse(ModelConfig, minimal(adapter_options={"poems": {"min_copies": 2}})["models"][0])}
    options = {"adapter_options": asked["adapter_options"].adapter_options, "replicas": 3}

    async def run():
        # Long enough for this test's own pauses, short enough to wait for.
        controller = make_controller(tmp_path, lost_s=1.5, **options)
        orders = await settle(controller, "r0", "r1", "r2", what=lambda o: sum(bool(x.wanted) for x in o.values()) == 2)
        holders = {r for r, o in orders.items() if o.wanted}
        # One holder goes silent: the plan repairs itself on the third.
        left = {"r0", "r1", "r2"} - {sorted(holders)[0]}
        orders = await settle(controller, *sorted(left), what=lambda o: all(x.wanted for x in o.values()))
        # A new controller adopts what is resident.
        successor = make_controller(tmp_path, **options)
        (entry,) = orders[sorted(left)[0]].wanted

        async def has_planned():
            for r in ("r0", "r1", "r2"):
                await successor.sync(report(r, [entry.id] if r in left else []))
            return (await successor.status())["plans"] >= 5

        await until(has_planned)
        status = await successor.status()
        assert {r for r, x in status["replicas"].items() if x["wanted"]} == left
        assert status["moves"] == 0
        assert (await successor.explain("poems"))["copies_wanted"] == 2

    asyncio.run(run())


def test_controller_follows_the_catalogue(tmp_path):
    write_adapter(tmp_path, "poems", b"one")

    async def run():
        controller = make_controller(tmp_path)
        view = CatalogueView(controller, refresh_s=0.05)
        first = await view.get("poems")
        assert first is not None
        await controller.sync(report("r0", [first.id], busy_s={first.id: 3.0}))
        write_adapter(tmp_path, "poems", b"second")
        write_adapter(tmp_path, "prose")

        async def newer():
            entry = await view.get("poems")
            return entry if entry is not None and entry.version != first.version else None

        second = await until(newer)
        assert second is not None
        await until(lambda: view.get("prose"))
        orders = await controller.sync(report("r0", [first.id]))
        assert orders.stale == (first.id,)

        # The new version takes over the demand of the old one, so it is placed before anyone asks for it.
        async def is_placed():
            orders = await controller.sync(report("r0", [first.id]))
            return [e.id for e in orders.wanted or ()] == [second.id]

        await until(is_placed)
        for f in (tmp_path / "prose").iterdir():
            f.unlink()

        async def is_gone():
            return await view.get("prose") is None

        await until(is_gone)

    asyncio.run(run())


def test_view_outlives_the_controller_and_asks_for_unknown_names(tmp_path):
    write_adapter(tmp_path, "poems")

    async def run():
        controller = make_controller(tmp_path)
        view = CatalogueView(controller, refresh_s=60.0)
        assert await view.get("poems") is not None
        write_adapter(tmp_path, "prose")
        assert await view.get("prose") is not None

        class Gone:
            async def news(self, *_):
                raise ConnectionError("gone")

            rescan = news

        view._link = Gone()
        assert await view.get("poems") is not None
        assert await view.get("nobody") is None

    asyncio.run(run())


def test_a_controller_that_has_not_heard_from_a_store_takes_nothing_away(tmp_path):
    write_adapter(tmp_path, "poems")

    async def run():
        first = make_controller(tmp_path)
        view = CatalogueView(first, refresh_s=60.0)
        known = await view.get("poems")
        assert known is not None
        # A new controller while the store is away: the name stays known, and what is in memory stays there.
        away = tmp_path.rename(tmp_path.with_name("away"))
        second = make_controller(tmp_path)
        view._link = second
        await view.refresh()
        orders = await second.sync(report("r0", [known.id]))
        assert orders.stale == ()
        assert await view.get("poems") == known
        # The store is back with another adapter instead: now the old one is gone for all.
        away.rename(tmp_path)
        (tmp_path / "poems").rename(tmp_path / "prose")
        await second._scan()
        await view.refresh()
        assert view.names() == ["prose"]
        assert (await second.sync(report("r0", [known.id]))).stale == (known.id,)

    asyncio.run(run())


def test_an_adapter_that_could_not_be_read_yet_is_not_taken_away(tmp_path, monkeypatch):
    gate = make_gate(monkeypatch)
    write_adapter(tmp_path, "poems")
    write_adapter(tmp_path, "prose")
    uri = f"gated://{tmp_path}"

    async def run():
        first = make_controller(uri)
        view = CatalogueView(first, refresh_s=60.0)
        poems, prose = await view.get("poems"), await view.get("prose")
        assert poems is not None
        assert prose is not None
        # A new controller whose first look fails for one of them, while the other is gone.
        gate(closed="poems")
        (tmp_path / "prose").rename(tmp_path / "other")
        second = make_controller(uri)
        view._link = second
        await view.refresh()
        assert await view.get("poems") == poems
        assert await view.get("other") is not None
        assert (await second.sync(report("r0", [poems.id, prose.id]))).stale == (prose.id,)
        assert "NoCredentialsError" in (await second.status())["store_faults"][uri]
        with pytest.raises(ConfigError, match="poems of base is not served: cannot read"):
            await second.explain("poems")
        gate(closed="")
        await second._scan()
        await view.refresh()
        assert view.names() == ["other", "poems"]
        assert (await second.sync(report("r0", [poems.id]))).stale == ()

    asyncio.run(run())


def test_controller_reports_what_cannot_be_served(tmp_path):
    write_adapter(tmp_path, "wide", config='{"peft_type": "LORA", "r": 64}')
    write_adapter(tmp_path, "x:y")
    write_adapter(tmp_path, "faulty")
    write_adapter(tmp_path, "good")

    async def run():
        controller = make_controller(tmp_path / ".")
        await settle(controller, "r0", what=lambda _: True)
        faulty = controller._names["faulty"]
        await controller.sync(report("r0", faults={faulty: "no such layer"}))
        status = await controller.status()
        faults = {name.split("@")[0]: fault for name, fault in status["faults"].items()}
        assert "no replica can hold it" in faults["wide"]
        assert "not allowed" in faults["x:y"]
        assert faults["faulty"] == "no such layer"
        assert "good" not in faults
        with pytest.raises(ConfigError, match="not allowed"):
            await controller.explain("x:y")
        with pytest.raises(ConfigError, match="base has no adapter 'nobody'; it has faulty, good, wide"):
            await controller.explain("base:nobody")
        assert (await controller.explain("base:good"))["adapter"].startswith("good@")

    asyncio.run(run())


def test_what_is_under_way_and_what_is_asked_for_in_vain(tmp_path):
    write_adapter(tmp_path, "poems")
    options = parse(ModelConfig, minimal(adapter_options={"poems": {"min_copies": 2}, "poem": {}})["models"][0])

    async def run():
        controller = make_controller(tmp_path, adapter_options=options.adapter_options, replicas=2)
        await controller.sync(report("r0", is_warming=True))
        pending = (await controller.status())["pending"]
        assert "no plan yet" in pending
        assert "1 of 2 replicas report" in pending
        assert "r0 loads its adapters" in pending
        orders = await settle(controller, "r0", "r1", what=lambda o: all(x.wanted for x in o.values()))
        (entry,) = orders["r0"].wanted
        await controller.sync(report("r0", [entry.id]))
        await controller.sync(report("r1"))
        status = await controller.status()
        assert status["pending"] == [f"{entry.id} is not yet in memory on r1"]
        assert status["faults"] == {"poem": "named in adapter_options, but no source has it"}
        await controller.sync(report("r1", faults={entry.id: "no such layer"}))
        assert (await controller.status())["pending"] == []

    asyncio.run(run())


def test_a_version_that_left_stays_retired_until_it_comes_back(tmp_path):
    write_adapter(tmp_path, "poems", b"one")

    async def run():
        controller = make_controller(tmp_path)
        await controller._scan()
        (old,) = controller._by_id
        write_adapter(tmp_path, "poems", b"second")
        await controller._scan()
        (new,) = controller._by_id
        assert (await controller.sync(report("r0", [old, new], retired=()))).stale == (old,)
        # No longer in memory: still refused, or an ingress that lags would have it loaded from the node's cache.
        assert (await controller.sync(report("r0", [new], retired=(old,)))).stale == (old,)
        # Nor is a refusal kept of content that nobody can ask for.
        assert (await controller.sync(report("r0", faults={old: "no such layer", new: "nor this"}))).stale == (old,)
        controller._put(Entry("poems", old.partition("@")[2], "uri", 1, 4))
        assert (await controller.sync(report("r0", retired=(old,)))).stale == ()

    asyncio.run(run())


def test_whoever_lags_behind_a_scan_of_many_changes_gets_them_all():
    async def run():
        controller = make_controller("/nowhere")
        scans = [[Entry(f"{part}{i}", "v", "uri", 1, 4) for i in range(2000)] for part in "ab"]
        changes = [(scans[0], []), (scans[1], scans[0])]
        controller._catalogue.scan, controller._catalogue.is_listed = lambda: changes.pop(0), lambda: True
        view = CatalogueView(controller, refresh_s=60.0)
        await controller._scan()
        await view.refresh()
        assert set(view.names()) == {e.name for e in scans[0]}
        await controller._scan()
        assert len(controller._changes) < 6000, "a part was forgotten"
        await view.refresh()
        assert set(view.names()) == {e.name for e in scans[1]}

    asyncio.run(run())


def test_a_controller_whose_loop_broke_ends(tmp_path, monkeypatch):
    """It would answer for ever and plan no more; Serve replaces one that ended."""
    codes = []
    monkeypatch.setattr("flora_vllm.cluster.controller.os._exit", codes.append)

    async def run():
        controller = make_controller(tmp_path)

        def break_down():
            raise ZeroDivisionError

        monkeypatch.setattr(controller, "_expire", break_down)
        await controller.sync(report("r0"))

        async def has_ended():
            return codes == [BROKEN]

        await until(has_ended)

    asyncio.run(run())


def test_a_view_that_was_never_told_anything_does_not_say_that_a_name_is_unknown():
    class Gone:
        async def news(self, *_):
            raise ConnectionError("gone")

        rescan = news

    async def run():
        with pytest.raises(LostError, match="no placement controller"):
            await CatalogueView(Gone(), refresh_s=60.0).get("poems")

    asyncio.run(run())


def test_store_error_is_an_os_error_and_pickles():
    import pickle

    for error in (StoreError("s"), StaleVersionError("v"), NoRoomError("n"), NotLoadedError("e"), LostError("l")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
