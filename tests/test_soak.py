"""A short run of soak.py, and that its check can fail."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from server_support import make_world, serving
from soak import NAMES, SERVER_OPTIONS, Soak, left_behind

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SECONDS = 40.0


def test_soak(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    world = make_world(tiny_model("llama"), tmp_path / "adapters")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with serving(world.model, {}, *SERVER_OPTIONS, environment={"TMPDIR": str(scratch)}) as client:
        soak = Soak(world, client, seed=0)
        soak.expect()
        soak.run(SECONDS, client.pid)
    assert soak.answers > 20
    assert soak.changes > 5
    assert soak.left > 5
    assert left_behind(scratch) == []


def test_the_check_can_fail() -> None:
    soak = Soak(world=None, client=None, seed=0)  # pyright: ignore[reportArgumentType] - neither is asked
    soak.expected = {("one", 0): (1,), ("two", 0): (2,)}
    name, start = NAMES[0], time.monotonic()
    soak._check(name, 0, None, start, time.monotonic())
    soak._note(name, "one")
    soak._check(name, 0, (1,), time.monotonic(), time.monotonic())
    soak._check(name, 0, None, time.monotonic(), time.monotonic())
    soak._note(name, "one", only=True)
    assert soak.faults == []
    soak._check(name, 0, None, time.monotonic(), time.monotonic())
    soak._check(name, 0, (2,), time.monotonic(), time.monotonic())
    assert len(soak.faults) == 2
