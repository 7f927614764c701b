"""Reading an adapter directory as one version, and never from outside the allowed root."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats import content_digest, files, read_adapter, read_files, resolve_under, write_flora

torch.set_num_threads(1)

MODULE = "model.layers.0.self_attn.q_proj"


def write_version(path: Path, value: float, rank: int = 1, width: int = 4) -> Path:
    """An adapter all of whose factors are `value`."""
    return write_flora(path, {MODULE: (torch.full((rank, width), value), torch.full((width, rank), value))})


def value_of(path: Path) -> float:
    """The value of `write_version`; every number in the adapter must be it."""
    values = {value for factor in read_adapter(path).modules[MODULE].tensors() for value in factor.unique().tolist()}
    assert len(values) == 1, values
    return values.pop()


def test_files_and_digest_belong_together(tmp_path: Path) -> None:
    path = write_version(tmp_path / "a", 1.0)
    found = read_files(path)
    assert found.config == (path / "adapter_config.json").read_bytes()
    assert bytes(found.weights) == (path / "adapter_model.safetensors").read_bytes()
    assert found.digest == content_digest(path)
    with pytest.raises(AdapterError, match="does not exist"):
        content_digest(tmp_path / "b")


def test_digest_tells_files_apart() -> None:
    contents = [{"a": b"xy", "b": b"z"}, {"a": b"x", "b": b"yz"}, {"a": b"xy", "c": b"z"}, {"a": b"z", "b": b"xy"}]
    digests = {files.digest_of({n: bytearray(c) for n, c in content.items()}) for content in contents}
    assert len(digests) == len(contents)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["rewrite", "replace", "grow", "shrink", "delete"])
def test_a_file_that_changes_while_it_is_read(name: str, how: str, tmp_path: Path, monkeypatch) -> None:
    path = write_version(tmp_path / "a", 1.0)
    file, content = path / name, (path / name).read_bytes()
    read_one = files.read_one

    def change_after(directory: int, read_name: str, most_bytes: int):
        result = read_one(directory, read_name, most_bytes)
        if read_name == "adapter_model.safetensors":
            match how:
                case "rewrite":
                    file.write_bytes(content)
                    os.utime(file, ns=(1, 1))
                case "replace":
                    (path / "new").write_bytes(content)
                    (path / "new").rename(file)
                case "grow":
                    file.write_bytes(content + b" ")
                case "shrink":
                    file.write_bytes(content[:-1])
                case "delete":
                    file.unlink()
        return result

    monkeypatch.setattr(files, "read_one", change_after)
    with pytest.raises(AdapterError, match=f"{name}: changed while it was read; publish adapters by renaming"):
        read_adapter(path)


def test_a_directory_that_a_network_file_system_lost(tmp_path: Path, monkeypatch) -> None:
    """Deleted on the server while it is open here."""
    path = write_version(tmp_path / "a", 1.0)

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(files.os, "scandir", stale)
    with pytest.raises(AdapterError, match=r"cannot be opened \(Stale file handle\)"):
        read_adapter(path)


def test_a_file_that_shrinks_during_the_read(tmp_path: Path, monkeypatch) -> None:
    path = write_version(tmp_path / "a", 1.0)
    fstat = os.fstat

    def fstat_then_truncate(descriptor: int) -> os.stat_result:
        result = fstat(descriptor)
        os.truncate(path / "adapter_model.safetensors", 16)
        return result

    monkeypatch.setattr(files.os, "fstat", fstat_then_truncate)
    with pytest.raises(AdapterError, match="changed while it was read"):
        read_adapter(path)


def test_a_directory_replaced_by_renames_gives_one_version(tmp_path: Path) -> None:
    """Versions differ in rank, so a config of one with weights of another would be refused as well."""
    path = write_version(tmp_path / "a", 1.0, rank=1, width=4096)
    done = threading.Event()

    def publish_forever() -> None:
        version = 1
        while not done.is_set():
            version = version % 4 + 1
            write_version(path, float(version), rank=version, width=4096)
            time.sleep(0.002)

    writer = threading.Thread(target=publish_forever)
    writer.start()
    seen, refusals, deadline = set(), [], time.monotonic() + 20
    try:
        while len(seen) < 4 and time.monotonic() < deadline:
            try:
                seen.add(value_of(path))
            except AdapterError as error:
                refusals.append(str(error))
    finally:
        done.set()
        writer.join()
    assert seen == {1.0, 2.0, 3.0, 4.0}
    # Between the two renames of a replacement there is no directory.
    assert [message for message in refusals if "the path does not exist" not in message] == []


def test_a_directory_written_in_place_is_refused_or_whole(tmp_path: Path) -> None:
    versions = [read_files(write_version(tmp_path / str(v), float(v), rank=v, width=4096)) for v in (1, 2)]
    path = write_version(tmp_path / "a", 1.0, width=4096)
    done = threading.Event()

    def overwrite_forever() -> None:
        turn = 0
        while not done.is_set():
            turn = 1 - turn
            (path / "adapter_config.json").write_bytes(versions[turn].config)
            (path / "adapter_model.safetensors").write_bytes(versions[turn].weights)
            time.sleep(0.002)

    writer = threading.Thread(target=overwrite_forever)
    writer.start()
    whole, refused, deadline = set(), 0, time.monotonic() + 20
    try:
        while not (refused and len(whole) == 2) and time.monotonic() < deadline:
            try:
                whole.add(value_of(path))
            except AdapterError:
                refused += 1
    finally:
        done.set()
        writer.join()
    assert whole == {1.0, 2.0}
    assert refused > 0


def test_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_version(tmp_path / "a", 1.0)
    os.truncate(path / "adapter_model.safetensors", 1 << 40)
    with pytest.raises(AdapterError, match="has 1099511627776 bytes; at most"):
        read_adapter(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter, and another adapter beside the root."""
    write_version(tmp_path / "root" / "team" / "a", 1.0)
    write_version(tmp_path / "outside", 2.0)
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["team/a", "./team/a", "team//a/"])
def test_paths_below_the_root(name: str, root: Path) -> None:
    assert resolve_under(root, name) == (root / "team" / "a").resolve()
    assert value_of(resolve_under(root, root / "team" / "a")) == 1.0


@pytest.mark.parametrize(
    "name", ["../outside", "team/../../outside", "team/../team/a", "/", "/etc", ".", "", "a\0b", "../root/team/a"]
)
def test_paths_that_leave_the_root(name: str, root: Path) -> None:
    with pytest.raises(AdapterError):
        resolve_under(root, name)
    with pytest.raises(AdapterError, match="below the adapter root"):
        resolve_under(root, root.parent / "outside")


def test_symbolic_links(root: Path) -> None:
    (root / "inside").symlink_to(root / "team" / "a")
    (root / "out").symlink_to(root.parent / "outside")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    assert value_of(resolve_under(root, "inside")) == 1.0
    for name in ("out", "up/outside", "up/root/../outside"):
        with pytest.raises(AdapterError):
            resolve_under(root, name)
    with pytest.raises(AdapterError):
        read_adapter(resolve_under(root, "loop"))
    # A root that is itself a link is the operator's choice.
    (root.parent / "alias").symlink_to(root)
    assert value_of(resolve_under(root.parent / "alias", "team/a")) == 1.0


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_links_out_of_the_root(name: str, root: Path) -> None:
    file = root / "team" / "a" / name
    file.unlink()
    file.symlink_to(root.parent / "outside" / name)
    with pytest.raises(AdapterError, match=f"{name}: a symbolic link that leaves the adapter root"):
        resolve_under(root, "team/a")
    # Links within the root are how a hub cache stores files.
    file.unlink()
    (root.parent / "outside" / name).rename(root / "blob")
    file.symlink_to(root / "blob")
    assert read_adapter(resolve_under(root, "team/a")).family == "FLORA"
