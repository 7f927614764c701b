"""Folders of dead processes go, those of living ones stay."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from flora_vllm.plugin import scratch


def _hold(pipe) -> None:
    folder = scratch.make("flora-test-")
    (folder / "7").mkdir()
    pipe.send(str(folder))
    signal.pause()


def test_a_folder_outlives_its_process_only_until_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(theirs,))
    process.start()
    held = Path(ours.recv())
    assert held.parent == tmp_path
    own = scratch.make("flora-test-")
    assert (held / "7").is_dir()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (tmp_path / "flora-test-without-a-lock").mkdir()
    other = scratch.make("flora-test-")
    assert not held.exists()
    assert own.is_dir()
    scratch.remove(own)
    scratch.remove(other)
    assert [path.name for path in tmp_path.iterdir()] == ["flora-test-without-a-lock"]
