"""What is read below a root stays below it, whatever is renamed and linked between the check and the read."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats import content_digest, write_flora
from flora_vllm.formats.beneath import Directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, value in (("root/team/a", 1.0), ("secret/a", 2.0)):
        write_flora(tmp_path / name, {"layers.0.q_proj": (torch.full((1, 4), value), torch.ones(4, 1))})
    return tmp_path / "root"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_same_content_as_without_a_root(root: Path) -> None:
    whole = content_digest(root / "team" / "a")
    before = open_files()
    (root / "link").symlink_to("team")
    (root / "team" / "b").symlink_to(root.resolve() / "link" / "a")
    (root / "team" / "round").symlink_to("../team/../link/./a")
    for path in ("team/a", root.resolve() / "team" / "a", "link/a", "team/b", "team/round", "./team//a/"):
        assert content_digest(path, root) == whole
    assert open_files() == before, "no descriptor is left open"


@pytest.mark.parametrize("target", ["../../secret/a", "../../secret/./a", "../../root/../secret/a"])
@pytest.mark.parametrize("absolute", [False, True])
def test_links_that_lead_out(target: str, absolute: bool, root: Path) -> None:
    before = open_files()
    (root / "team" / "out").symlink_to(root / "team" / target if absolute else target)
    with pytest.raises(AdapterError, match="leads out of the adapter root"):
        content_digest("team/out", root)
    (root / "team" / "a" / WEIGHTS).unlink()
    (root / "team" / "a" / WEIGHTS).symlink_to(
        f"{root.parent}/secret/a/{WEIGHTS}" if absolute else f"../{target}/{WEIGHTS}"
    )
    with pytest.raises(AdapterError, match=f"{WEIGHTS}: it leads out of the adapter root"):
        content_digest("team/a", root)
    assert open_files() == before


@pytest.mark.parametrize(
    "path", ["..", "../secret/a", "team/../../secret/a", "/etc", "loop", "team/a/adapter_config.json/x"]
)
def test_paths_that_lead_out_or_nowhere(path: str, root: Path) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(AdapterError):
        content_digest(path, root)


@pytest.mark.parametrize("changed", ["team", "a", CONFIG, WEIGHTS])
def test_a_link_made_after_the_check(changed: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step in turn becomes a link to the secret right after it was found to be none."""
    place = next(
        path for path in (root / "team", root / "team" / "a", root / "team" / "a" / changed) if path.name == changed
    )
    target = {"team": "secret", "a": "secret/a"}.get(changed, f"secret/a/{changed}")
    look = os.stat
    turned = []

    def look_and_change(path: str, **options: object) -> os.stat_result:
        found = look(path, **options)
        if path == changed and options.get("follow_symlinks") is False and not turned:
            turned.append(path)
            place.rename(root / "aside")
            place.symlink_to(root.parent / target)
        return found

    monkeypatch.setattr(os, "stat", look_and_change)
    with pytest.raises(AdapterError):
        content_digest("team/a", root)
    assert turned


def test_links_that_flip_while_they_are_read(root: Path) -> None:
    """With real races: what is read is the adapter below the root or nothing, never the secret."""
    inside, secret = content_digest(root / "team" / "a"), content_digest(root.parent / "secret" / "a")
    stop = threading.Event()

    def flip() -> None:
        targets = ["team/a", "../secret/a"]
        while not stop.is_set():
            targets.reverse()
            (root / "new").symlink_to(targets[0])
            (root / "new").rename(root / "moving")

    thread = threading.Thread(target=flip)
    thread.start()
    read, tries, deadline = set(), 0, time.monotonic() + 60
    try:
        # On a busy machine one thread may have many turns before the other has any.
        while tries < 400 or (len(read) < 2 and time.monotonic() < deadline):
            tries += 1
            try:
                read.add(content_digest("moving", root))
            except AdapterError:
                read.add("")
    finally:
        stop.set()
        thread.join()
    assert secret not in read
    assert read == {inside, ""}


def test_a_directory_that_is_deleted_while_it_is_open(root: Path) -> None:
    with Directory("team/a", root) as directory:
        shutil.rmtree(root / "team" / "a")
        with pytest.raises(FileNotFoundError):
            directory.open(CONFIG, os.O_RDONLY)
    with pytest.raises(AdapterError, match="does not exist"):
        content_digest("team/a", root)
