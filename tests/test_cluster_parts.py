"""The parts of the cluster that need no Ray: configuration, store and memory."""

import asyncio
import os
import random
import threading

import pytest
from cluster_support import minimal, write_adapter

from flora_vllm.cluster.config import ClusterConfig, parse, read_config, to_data
from flora_vllm.cluster.memory import AdapterMemory, NoRoomError
from flora_vllm.cluster.store import Cache, Catalogue, Entry, StaleVersionError
from flora_vllm.errors import AdapterError, ConfigError

# ---- configuration


def test_config_round_trips_and_fills_defaults(tmp_path):
    data = minimal(adapters=["/a"], adapter_options={"poems": {"min_copies": 2}}, autoscale={"max_replicas": 3})
    config = parse(ClusterConfig, data)
    assert config.models[0].adapter_options["poems"].min_copies == 2
    assert config.models[0].autoscale is not None
    assert parse(ClusterConfig, to_data(config)) == config
    path = tmp_path / "cluster.yaml"
    path.write_text("models:\n- {name: base, source: hub/id, policy: {copy_share: 1}}\n")
    assert read_config(path).models[0].policy.copy_share == 1.0
    path.write_text("models:\n- {name: base, source: ./model, adapters: [../adapters, /a, s3://b/c]}\n")
    (model,) = read_config(path).models
    assert model.source == str(tmp_path / "model")
    assert model.adapters == (str(tmp_path.parent / "adapters"), "/a", "s3://b/c")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["models is missing"]),
        ({"models": []}, ["at least one"]),
        (minimal(slots="many", wheels=3), ["slots must be int", "unknown key 'wheels'"]),
        (minimal(name="a:b"), ["a:b", "is not allowed"]),
        (minimal(adapter_options={"x:y": {}}), ["x:y"]),
        (minimal(adapter_options={"x": {"min_copies": 3, "max_copies": 2}}), ["min_copies"]),
        (minimal(slots=1), ["leave none"]),
        (minimal(adapters=["adapters"]), ["'adapters' must be an absolute path"]),
        (minimal(device="tpu"), ["gpu or cpu"]),
        (minimal(engine={"max_loras": 3}), ["max_loras"]),
        (minimal(policy={"copy_share": 7}, routing={"choices": 0}), ["copy_share", "choices"]),
        (minimal(replicas=True), ["replicas must be int"]),
        ({"models": minimal()["models"] * 2}, ["distinct"]),
        ({**minimal(), "name": "my app"}, ["'my app' is not allowed"]),
        ({**minimal(), "timing": {"lost_s": 0.1}}, ["lost_s"]),
    ],
)
def test_bad_config_is_refused_with_every_fault(data, words):
    with pytest.raises(ConfigError) as caught:
        parse(ClusterConfig, data)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unreadable_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("models: [")
    with pytest.raises(ConfigError, match="not YAML"):
        read_config(tmp_path / "bad.yaml")


# ---- store


def test_scan_finds_new_changed_removed_and_faulty(tmp_path):
    write_adapter(tmp_path, "poems")
    write_adapter(tmp_path, "a:b")
    write_adapter(tmp_path, "broken", config="{")
    write_adapter(tmp_path, "rankless", config='{"r": "four"}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    (tmp_path / "unrelated").mkdir()
    catalogue = Catalogue([str(tmp_path)])
    added, removed = catalogue.scan()
    assert [e.name for e in added] == ["poems"]
    assert not removed
    assert added[0].rank == 4
    assert set(catalogue.faults) == {"a:b", "broken", "rankless", "half"}
    assert "':'" in catalogue.faults["a:b"]
    assert catalogue.scan() == ([], [])
    write_adapter(tmp_path, "poems", b"other weights")
    (changed,), _ = catalogue.scan()
    assert changed.version != added[0].version
    (tmp_path / "poems" / "adapter_model.safetensors").unlink()
    assert [e.name for e in catalogue.scan()[1]] == ["poems"]


def test_same_size_and_time_but_other_file_is_another_version(tmp_path):
    directory = write_adapter(tmp_path, "poems", b"one")
    catalogue = Catalogue([str(tmp_path)])
    (first,), _ = catalogue.scan()
    target = directory / "adapter_model.safetensors"
    times = (target.stat().st_atime_ns, target.stat().st_mtime_ns)
    replacement = tmp_path / "replacement"
    replacement.write_bytes(b"two")
    os.utime(replacement, ns=times)
    replacement.rename(target)
    (second,), _ = catalogue.scan()
    assert second.version != first.version


def test_unreachable_source_keeps_the_rest(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_adapter(good, "poems")
    write_adapter(bad, "prose")
    catalogue = Catalogue([str(bad), str(good), "nosuchstore://bucket"])
    catalogue.scan()
    assert set(catalogue.entries) == {"poems", "prose"}
    assert "nosuchstore" in catalogue.store_faults["nosuchstore://bucket"]
    bad.rename(tmp_path / "moved")
    assert catalogue.scan() == ([], [])
    assert "cannot list" in catalogue.store_faults[str(bad)]


def test_a_source_that_does_not_answer_holds_up_nobody(tmp_path):
    write_adapter(tmp_path / "good", "poems")
    catalogue = Catalogue(["slow://", str(tmp_path / "good")], patience_s=0.2)
    slow, answers = catalogue._sources[0], threading.Event()

    def hang():
        answers.wait(30)
        return {"prose": Entry("prose", "v", "slow://prose", 1, 1)}, {}

    slow.scan = hang
    assert [e.name for e in catalogue.scan()[0]] == ["poems"]
    assert "has not answered" in catalogue.store_faults["slow://"]
    assert not catalogue.is_complete()
    answers.set()
    assert [e.name for e in catalogue.scan()[0]] == ["prose"]
    assert catalogue.is_complete()
    assert not catalogue.store_faults


def test_object_store_through_fsspec(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/poems/adapter_config.json", b'{"r": 2, "rank_pattern": {"q_proj": 8}}')
    fs.pipe("/bucket/poems/adapter_model.safetensors", b"weights")
    try:
        catalogue = Catalogue(["memory://bucket"])
        (entry,), _ = catalogue.scan()
        assert entry.rank == 8
        path = Cache(tmp_path / "cache", 10**9).fetch(entry)
        assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    finally:
        fs.rm("/bucket", recursive=True)


def test_fetch_is_exact_or_fails(tmp_path):
    write_adapter(tmp_path / "src", "poems", b"one")
    catalogue, cache = Catalogue([str(tmp_path / "src")]), Cache(tmp_path / "cache", 10**9)
    (old,), _ = catalogue.scan()
    path = cache.fetch(old)
    write_adapter(tmp_path / "src", "poems", b"second")
    assert (cache.fetch(old) / "adapter_model.safetensors").read_bytes() == b"one"
    (new,), _ = catalogue.scan()
    assert (cache.fetch(new) / "adapter_model.safetensors").read_bytes() == b"second"
    assert path != cache.fetch(new)
    write_adapter(tmp_path / "src", "prose", b"x")
    (gone,), _ = catalogue.scan()
    write_adapter(tmp_path / "src", "prose", b"yy")
    with pytest.raises(StaleVersionError, match="no longer"):
        cache.fetch(gone)
    (tmp_path / "src" / "prose" / "adapter_config.json").unlink()
    with pytest.raises(StaleVersionError):
        cache.fetch(gone)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


def test_cache_clean_up_keeps_what_is_used(tmp_path):
    for name in ("a", "b", "c"):
        write_adapter(tmp_path / "src", name, b"x" * 1000)
    catalogue, cache = Catalogue([str(tmp_path / "src")]), Cache(tmp_path / "cache", 1500)
    paths = {e.name: cache.fetch(e) for e in catalogue.scan()[0]}
    for age, name in enumerate("abc"):
        os.utime(paths[name], (age, age))
    assert cache.clean([paths["a"]], spare_s=0) > 0
    assert {n for n, p in paths.items() if p.is_dir()} == {"a"}
    assert cache.clean([], spare_s=1000) == 0


# ---- memory


class FakeEngine:
    """Keeps the law: no double load, no unload of what is not there."""

    def __init__(self):
        self.held, self.log, self.gate = set(), [], asyncio.Event()
        self.gate.set()
        self.refuse = set()

    async def load(self, entry, path):
        await self.gate.wait()
        if entry.name in self.refuse:
            raise AdapterError(f"{entry.name} is faulty")
        assert entry.id not in self.held
        self.held.add(entry.id)
        self.log.append(f"+{entry.name}")

    async def unload(self, adapter_id):
        await asyncio.sleep(0.005)
        self.held.remove(adapter_id)
        self.log.append(f"-{adapter_id.split('@')[0]}")


def make_memory(tmp_path, names, slots, **options):
    for name in names:
        write_adapter(tmp_path / "src", name, name.encode() * 10)
    entries = {e.name: e for e in Catalogue([str(tmp_path / "src")]).scan()[0]}
    engine = FakeEngine()
    memory = AdapterMemory(engine, Cache(tmp_path / "cache", 10**9), slots, lambda: None, **options)
    return memory, engine, entries


def test_memory_evicts_least_used_unwanted_first_and_never_what_runs(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abcd", 3)
        memory.wanted = (e["a"].id,)
        await memory.prewarm([e["a"]])
        async with memory.using(e["b"]):
            async with memory.using(e["c"]):
                pass
            async with memory.using(e["d"]):
                assert engine.held == {e["a"].id, e["b"].id, e["d"].id}
        assert engine.log == ["+a", "+b", "+c", "-c", "+d"]

    asyncio.run(run())


def test_memory_waits_for_a_slot_and_gives_up_aloud(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 1, wait_s=0.3)
        async with memory.using(e["a"]):
            with pytest.raises(NoRoomError):
                await memory.using(e["b"]).__aenter__()
            waiter = asyncio.create_task(memory.using(e["b"]).__aenter__())
            await asyncio.sleep(0.05)
            assert not waiter.done()
        await waiter
        assert engine.held == {e["b"].id}

    asyncio.run(run())


def test_memory_prewarm_takes_no_slot_from_wanted_or_running(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abc", 2)
        memory.wanted = tuple(e[n].id for n in "ab")
        await memory.prewarm([e["a"], e["b"], e["c"]])
        assert engine.held == {e["a"].id, e["b"].id}
        assert e["c"].id in memory.troubles

    asyncio.run(run())


def test_memory_many_requests_at_once_load_once(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "abcdef", 3)
        rng = random.Random(0)

        async def request():
            entry = e[rng.choice("abcdef")]
            async with memory.using(entry):
                assert entry.id in engine.held
                await asyncio.sleep(rng.random() / 100)
                assert entry.id in engine.held
                assert len(engine.held) <= 3

        await asyncio.gather(*(request() for _ in range(200)))
        assert memory.in_use() == 0
        busy = memory.take_busy_s()
        assert 0.5 < sum(busy.values()) < 10
        assert memory.take_busy_s() == {}

    asyncio.run(run())


def test_memory_remembers_faults_and_respects_bytes(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4, limit_bytes=15)
        engine.refuse = {"a"}
        for _ in range(2):
            with pytest.raises(AdapterError, match="faulty"):
                await memory.using(e["a"]).__aenter__()
        assert memory.faults.keys() == {e["a"].id}
        engine.refuse = set()
        async with memory.using(e["b"]):
            pass
        big = Entry("big", "v", e["b"].uri, 99, 1)
        with pytest.raises((AdapterError, StaleVersionError)):
            await memory.using(big).__aenter__()

    asyncio.run(run())


def test_memory_drops_stale_versions_when_idle(tmp_path):
    async def run():
        memory, engine, e = make_memory(tmp_path, "ab", 4)
        async with memory.using(e["a"]):
            await memory.drop_stale(lambda _: False)
            assert engine.held == {e["a"].id}
        await memory.drop_stale(lambda _: False)
        assert engine.held == set()

    asyncio.run(run())
