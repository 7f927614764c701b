"""Launches that Triton did not look at: the kernel that it would launch, for an H100 that is not here."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels are tested where Triton is installed")

from flora_vllm.ops.gpu import compiled
from flora_vllm.ops.gpu.check import Trial
from flora_vllm.ops.terms import SlotLimits, group_by_slot

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("gpu_host")


def odd(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers two bytes off a multiple of 16."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def test_a_launch_again_is_of_the_kernel_that_triton_chooses(bench) -> None:
    """Addresses, strides and numbers that Triton compiles anew for come after others, and before them."""
    trial = Trial(torch.device("cpu"), torch.float16, (64, 32), 64, tokens=24)
    slots = [None, trial.terms(8, 3), trial.terms(1), None]
    x_TI, bias_O = trial.x_TI, trial.bias_O
    wide_TI = torch.cat([x_TI, x_TI[:, :8]], 1)
    steps = [
        (x_TI, bias_O),
        (odd(x_TI), bias_O),
        (wide_TI[:, :64], bias_O),  # a stride that is no multiple of 16
        (x_TI, odd(bias_O)),
        (x_TI[:1], bias_O),
        (x_TI[:3], None),
    ]
    with bench.standing_in() as stand_in, torch.inference_mode():
        kernel = trial.kernel("auto", SlotLimits(slots=3, rank=8, low_rank=16), slots)
        names = set()

        def launched(x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> list[tuple]:
            stand_in.launched.clear()
            kernel.forward(x_TI, bias_O, group_by_slot([1] * (len(x_TI) - 2) + [2, 3][: len(x_TI)]))
            return [
                (function, grid, [a for a in args if not isinstance(a, torch.Tensor)])
                for function, grid, args in stand_in.launched
            ]

        for _ in range(2):
            again = [launched(*step) for step in steps]
        kept = len(compiled._compiled)
        assert [launched(*step) for step in steps] == again
        assert len(compiled._compiled) == kept, "nothing was looked at again"
        for step, of_step in zip(steps, again, strict=True):
            compiled._compiled.clear()
            assert launched(*step) == of_step
            names |= {function for function, _, _ in of_step}
        assert len(names) > 6, "some of these are compiled apart"


def test_host_time_of_a_layer_call(bench) -> None:
    """25 µs is the aim on a quiet machine (`benchmarks/gpu_host.py`); this one runs other tests beside it."""
    with torch.inference_mode():
        rows = {row["case"]: row for row in bench.host_rows()}
    assert [row["launches"] for row in rows.values()] == [1, 2, 3]
    assert all(0 < row["host_us"]["median"] < 250 for row in rows.values())
