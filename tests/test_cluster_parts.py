"""The parts of the cluster that need no Ray: configuration, store and cache."""

import os
import shutil
import sys
import threading

import fsspec
import pytest
from cluster_support import make_gate, minimal, write_adapter
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.hf_api import RepoFile, RepoFolder
from peft import AdaLoraConfig, HiraConfig, LoKrConfig, LoraConfig, OFTConfig, RandLoraConfig, ShiraConfig, VeraConfig

from flora_vllm.cluster.config import ClusterConfig, parse, read_config, to_data
from flora_vllm.cluster.store import Cache, Catalogue, Entry, Found, StaleVersionError, StoreError
from flora_vllm.errors import ConfigError

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
    models = "models:\n- {name: base, source: ./model, adapters: [../adapters, /a, s3://b/c]}\n"
    path.write_text(models + "store: {cache_dir: ./cache}\n")
    (model,) = read_config(path).models
    assert read_config(path).store.cache_dir == str(tmp_path / "cache")
    path.write_text(models + "store: {cache_dir: ~/cache}\n")
    assert read_config(path).store.cache_dir == "~/cache", "of each node"
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
        (minimal(cpus=-1), ["cpus must be >= 0, got -1"]),
        (minimal(cpus=float("nan")), ["models[0].cpus must be a finite number, got nan"]),
        ({**minimal(), "ingress": {"retry_s": float("inf")}}, ["ingress.retry_s must be a finite number, got inf"]),
        (minimal(replicas=True), ["replicas must be int"]),
        (
            minimal(flora={"adapter_acl": "acl", "adapter_names": "x", "adapter_root": "/r", "max_upload_bytes": 1}),
            [
                "adapter_acl (--adapter-acl) is kept by the HTTP",
                "adapter_names (",
                "adapter_root (",
                "max_upload_bytes",
            ],
        ),
        (minimal(flora={"adapter_shares": "key"}), ["adapter_shares (--adapter-shares) is kept", "use prefix"]),
        ({"models": minimal()["models"] * 2}, ["distinct"]),
        ({"models": [*minimal(name="a.b")["models"], *minimal(name="a_b")["models"]]}, ["distinct"]),
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
    write_adapter(tmp_path, "rankless", config='{"peft_type": "LORA", "r": "four"}')
    write_adapter(tmp_path, "listed", config="[4]")
    write_adapter(tmp_path, "endless", config=f'{{"peft_type": "LORA", "r": {10**400}}}')
    write_adapter(tmp_path, "patterned", config='{"peft_type": "LORA", "r": 4, "rank_pattern": [8]}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    (tmp_path / "unrelated").mkdir()
    catalogue = Catalogue([str(tmp_path)])
    added, removed = catalogue.scan()
    assert [e.name for e in added] == ["poems"]
    assert not removed
    assert added[0].rank == 4
    assert set(catalogue.faults) == {"a:b", "broken", "rankless", "half", "listed", "endless", "patterned"}
    assert "':'" in catalogue.faults["a:b"]
    assert catalogue.scan() == ([], [])
    write_adapter(tmp_path, "poems", b"other weights")
    (changed,), _ = catalogue.scan()
    assert "not an object" in catalogue.faults["listed"]
    assert "'r' is 'four'; allowed: an integer of at least 1" in catalogue.faults["rankless"]
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


def test_a_source_named_twice_is_one(tmp_path):
    write_adapter(tmp_path / "src", "poems")
    (tmp_path / "c.yaml").write_text("models:\n- {name: base, source: hub/id, adapters: [./src, ./src/]}\n")
    catalogue = Catalogue(read_config(tmp_path / "c.yaml").models[0].adapters)
    assert [e.name for e in catalogue.scan()[0]] == ["poems"]
    assert catalogue.scan() == ([], [])
    assert not catalogue.store_faults


def test_adapters_behind_symbolic_links_are_served(tmp_path):
    real, source = tmp_path / "real", tmp_path / "src"
    for name in ("one", "two"):
        write_adapter(real, name, name.encode())
    (source / "files").mkdir(parents=True)
    (source / "whole").symlink_to(real / "one")
    for file in (real / "one").iterdir():
        (source / "files" / file.name).symlink_to(file)
    (source / "nowhere").symlink_to(real / "three")
    catalogue, cache = Catalogue([str(source)]), Cache(tmp_path / "cache", 10**9)
    first = {e.name: e for e in catalogue.scan()[0]}
    assert set(first) == {"files", "whole"}
    assert (catalogue.faults, catalogue.store_faults) == ({}, {})
    assert catalogue.scan() == ([], [])
    (source / "whole").unlink()
    (source / "whole").symlink_to(real / "two")
    (changed,), _ = catalogue.scan()
    assert changed.name == "whole"
    assert (cache.fetch(changed) / "adapter_model.safetensors").read_bytes() == b"two"
    assert (cache.fetch(first["files"]) / "adapter_model.safetensors").read_bytes() == b"one"
    write_adapter(real, "one", b"new")
    assert [e.name for e in catalogue.scan()[0]] == ["files"]


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
        return Found({"prose": Entry("prose", "v", "slow://prose", 1, 1)})

    slow.scan = hang
    assert [e.name for e in catalogue.scan()[0]] == ["poems"]
    assert "has not answered" in catalogue.store_faults["slow://"]
    assert not catalogue.is_listed()
    answers.set()
    assert [e.name for e in catalogue.scan()[0]] == ["prose"]
    assert catalogue.is_listed()
    assert not catalogue.store_faults


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (LoraConfig(r=8, rank_pattern={"q_proj": 24}), 24),
        (HiraConfig(r=24), 24),
        # No limit counts the number that these state: whether they fit is told by what the engine builds.
        (VeraConfig(), 1),
        (RandLoraConfig(), 1),
        (ShiraConfig(), 1),
        (LoKrConfig(r=32), 1),
        (OFTConfig(r=32, oft_block_size=0), 1),
        (AdaLoraConfig(init_r=32, total_step=9, rank_pattern={"q_proj.lora_E": [True, False, True]}), 1),
    ],
    ids=lambda value: getattr(value, "peft_type", value),
)
def test_a_rank_counts_where_a_limit_counts_it(tmp_path, config, rank):
    config.save_pretrained(write_adapter(tmp_path, "poems"))
    catalogue = Catalogue([str(tmp_path)])
    ((entry,), _) = catalogue.scan()
    assert (entry.rank, catalogue.faults) == (rank, {})


def hub_file(name, blob):
    return RepoFile(path=f"poems/{name}", size=100, oid=blob)


def test_a_new_version_on_the_hub_is_noticed_by_its_blob(monkeypatch):
    """Hugging Face's file system tells no time and no ETag, and remembers what it listed once."""
    blob, config = ["one"], b'{"peft_type": "FLORA", "r": 4}'

    def tree(_self, _repo, path=None, **_options):
        if path:
            return [hub_file("adapter_config.json", "c"), hub_file("adapter_model.safetensors", blob[0])]
        return [RepoFolder(path="poems", oid="t")]

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "list_repo_tree", tree)
    monkeypatch.setattr(HfFileSystem, "cat_file", lambda *_, **__: config)
    catalogue = Catalogue(["hf://me/adapters"])
    (first,), _ = catalogue.scan()
    assert catalogue.scan() == ([], [])
    blob[0] = "two"
    (second,), _ = catalogue.scan()
    assert (second.name, second.version) != (first.name, first.version)


def test_files_that_nothing_tells_a_change_of_are_at_fault(tmp_path, monkeypatch):
    write_adapter(tmp_path, "poems")
    info = LocalFileSystem.info

    def bare(self, path, **kwargs):
        return {k: v for k, v in info(self, path, **kwargs).items() if k in ("name", "size", "type")}

    monkeypatch.setattr(LocalFileSystem, "info", bare)
    catalogue = Catalogue([str(tmp_path)])
    assert catalogue.scan() == ([], [])
    assert "neither a checksum nor a time of change of adapter_config.json" in catalogue.faults["poems"]


def test_object_store_through_fsspec(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/poems/adapter_config.json", b'{"peft_type": "LORA", "r": 2, "rank_pattern": {"q_proj": 8}}')
    fs.pipe("/bucket/poems/adapter_model.safetensors", b"weights")
    try:
        catalogue = Catalogue(["memory://bucket"])
        (entry,), _ = catalogue.scan()
        assert entry.rank == 8
        path = Cache(tmp_path / "cache", 10**9).fetch(entry)
        assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    finally:
        fs.rm("/bucket", recursive=True)


def test_the_last_adapter_of_an_object_store_can_be_taken_away(tmp_path):
    fs = fsspec.filesystem("memory")
    catalogue = Catalogue(["memory://emptied/adapters"])
    assert catalogue.scan() == ([], [])
    assert "no such directory" in catalogue.store_faults["memory://emptied/adapters"], "a mistyped one"
    for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weights")):
        fs.pipe(f"/emptied/adapters/poems/{name}", content)
    try:
        assert [e.name for e in catalogue.scan()[0]] == ["poems"]
    finally:
        fs.rm("/emptied", recursive=True)
    assert [e.name for e in catalogue.scan()[1]] == ["poems"]
    assert not catalogue.store_faults


def test_a_store_that_lets_nobody_in_keeps_nobody_else_from_serving(tmp_path, monkeypatch):
    gate = make_gate(monkeypatch)
    write_adapter(tmp_path / "good", "poems")
    write_adapter(tmp_path / "shut", "prose")
    uri = f"gated://{tmp_path}/shut"
    catalogue, cache = Catalogue([uri, str(tmp_path / "good")]), Cache(tmp_path / "cache", 10**9)
    gate(closed="/")
    assert [e.name for e in catalogue.scan()[0]] == ["poems"]
    assert "NoCredentialsError: unable to locate credentials" in catalogue.store_faults[uri]
    gate(closed="")
    (prose,), _ = catalogue.scan()
    assert not catalogue.store_faults
    gate(closed="/")
    with pytest.raises(StoreError, match="unable to locate credentials"):
        cache.fetch(prose)
    gate(closed="", cut=True)
    with pytest.raises(StoreError, match=r"3 of .* bytes"):
        cache.fetch(prose)
    gate(cut=False)
    assert (cache.fetch(prose) / "adapter_model.safetensors").read_bytes() == b"weights"


def test_an_adapter_that_cannot_be_read_for_a_moment_stays(tmp_path, monkeypatch):
    gate = make_gate(monkeypatch)
    write_adapter(tmp_path, "poems")
    write_adapter(tmp_path, "prose")
    uri = f"gated://{tmp_path}"
    catalogue = Catalogue([uri])
    assert len(catalogue.scan()[0]) == 2
    write_adapter(tmp_path, "new")
    for closed in ("poems", "poems/adapter_config.json"):
        write_adapter(tmp_path, "poems", closed.encode())
        gate(closed=closed)
        catalogue.scan()
        assert set(catalogue.entries) == {"poems", "prose", "new"}
        assert "1 of its adapters stay as they were: cannot read" in catalogue.store_faults[uri]
        assert not catalogue.unread
        assert not catalogue.faults
    gate(closed="")
    assert [e.name for e in catalogue.scan()[0]] == ["poems"]
    assert not catalogue.store_faults
    # What is not there is not there, and what is wrong with it now is.
    shutil.rmtree(tmp_path / "poems")
    write_adapter(tmp_path, "prose", config="{")
    assert {e.name for e in catalogue.scan()[1]} == {"poems", "prose"}


def test_s3_without_its_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    catalogue = Catalogue(["s3://bucket/adapters"])
    assert catalogue.scan() == ([], [])
    assert "s3fs" in catalogue.store_faults["s3://bucket/adapters"]


def test_file_url_is_a_directory(tmp_path):
    write_adapter(tmp_path / "src", "poems")
    ((entry,), _), cache = Catalogue([f"file://{tmp_path}/src"]).scan(), Cache(tmp_path / "cache", 10**9)
    assert (cache.fetch(entry) / "adapter_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["content", "missing", "digest"])
def test_a_damaged_copy_is_fetched_anew(tmp_path, damage):
    """A node that lost power keeps what it had written by then."""
    write_adapter(tmp_path / "src", "poems")
    (entry,), _ = Catalogue([str(tmp_path / "src")]).scan()
    copy = Cache(tmp_path / "cache", 10**9).fetch(entry)
    if damage == "content":
        (copy / "adapter_model.safetensors").write_bytes(b"weightz")
    else:
        (copy / ("digest" if damage == "digest" else "adapter_config.json")).unlink()
    again = Cache(tmp_path / "cache", 10**9).fetch(entry)
    assert (again / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (again / "adapter_config.json").is_file()


def test_a_cache_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"store\.cache_dir .*file/cache"):
        Cache(tmp_path / "file" / "cache", 10**9)


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
