"""The Triton kernels compiled for GPUs that are not here: no spills, within the chip's memory, on its tensor cores."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels are tested where Triton is installed")

# Triton 3.9 announces a change of default in 3.10; the kernels hold no sum that it would change.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("triton_compile")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Kernels are compiled here, not found from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_serving_kernels_fit_the_chip(bench, sm: int) -> None:
    serving = ("stacked 64x32x64 split=2 and down", "stacked 128x64x64 split=1", "modulated 128x128x64 rank=16")
    chosen = [case for case in bench.cases(torch.bfloat16, sm) if case.name in serving]
    assert len(chosen) == len(serving)
    for case in chosen:
        assert case.newest
        report = bench.compile_case(case, sm)
        assert not report.faults(), report
        assert report.shared_bytes > 0
        assert report.registers > 32


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_kernel_fits_the_chip(bench, dtype: torch.dtype, sm: int) -> None:
    faults = [fault for case in bench.cases(dtype, sm) for fault in bench.compile_case(case, sm).faults(case.newest)]
    assert not faults


def test_a_tile_too_large_is_found_out(bench) -> None:
    """The gate sees what it is there for: this tile neither fits the registers nor sm_80's shared memory."""
    case = next(case for case in bench.cases(torch.bfloat16, 80) if case.name == "modulated 128x128x64 rank=16")
    larger = dataclasses.replace(case, constants={**case.constants, "BM": 256, "STAGES": 5}, warps=4)
    faults = bench.compile_case(larger, 80).faults()
    assert any("spills" in fault for fault in faults)
    assert any("shared memory" in fault for fault in faults)
    small = next(case for case in bench.cases(torch.bfloat16, 90) if case.name == "up 16x16x128")
    assert bench.compile_case(small, 90).faults() == ["up 16x16x128 on sm_90: no HGMMA instruction"]
