"""The newer vLLM that we run on, beside the installed one: every hook holds, and an engine serves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_sources import REPOSITORY, SOURCES, runnable_package

from flora_vllm.plugin import hooks

pytestmark = [pytest.mark.engine]

HOOKS_HOLD = "tests/test_hooks.py::test_installed_vllm_has_every_hook"


@pytest.mark.parametrize("minor", [minor for minor in hooks.RUN_VERSIONS if minor in SOURCES])
def test_hooks_hold_and_an_engine_serves(minor: str, tmp_path: Path) -> None:
    overlay = runnable_package(minor, tmp_path / "overlay")
    paths = [str(overlay), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    version = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__version__)"], env=environment, capture_output=True, text=True
    )
    assert version.stdout.strip().startswith(f"{minor}."), version.stderr[-2000:]
    tests = [HOOKS_HOLD, "tests/test_preload.py", "tests/test_shares.py", "tests/test_turns.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
