"""The Triton kernels without a GPU. Triton decides at import whether it interprets, so that is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels are tested where Triton is installed")


FILES = (
    "triton_interpreted.py",
    "triton_interpreted_steps.py",
    "triton_interpreted_table.py",
    "triton_interpreted_graphs.py",
    "triton_interpreted_shell.py",
    "triton_interpreted_tune.py",
)


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_match_the_reference_in_the_interpreter(marked: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", *FILES]
    run = subprocess.run(
        command,
        cwd=here,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_importing_the_ops_loads_no_triton() -> None:
    code = "import sys, flora_vllm.ops.gpu.linear; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
