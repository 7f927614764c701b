"""The table's `triton` row, chosen and used as an engine does; test_triton_linear.py runs this in its own process."""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

from collections.abc import Callable, Sequence

import pytest
import torch
from ops_support import Case, assert_close, load
from triton_support import CPU, fresh_memory_is_nan, name_of, record_launches, replay

from flora_vllm.ops import table
from flora_vllm.ops.dispatch import NEVER, DispatchRule, PathChoice
from flora_vllm.ops.gpu import check as triton_check
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.gpu.opaque_linear import TritonOpaqueLinear
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.terms import SlotLimits, group_by_slot

__all__ = ["fresh_memory_is_nan"]

LIMITS = SlotLimits(slots=5, rank=16, low_rank=16)


@pytest.fixture(autouse=True)
def _no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row above ours on a CPU steps aside."""
    monkeypatch.setenv("FLORA_NATIVE", "0")


def make(case: Case, path: PathChoice = "auto") -> TritonLinear:
    rule = DispatchRule(path, constant=2.0, slope=0.25)
    kernel = table.make_linear(case.weight_OI, case.base, case.sizes, rule, case.in_features, CPU, LIMITS)
    assert isinstance(kernel, TritonLinear)
    for slot, terms in enumerate(case.slots[1:], 1):
        kernel.write_slot(slot, terms)
    return kernel


def check(case: Case, kernel: table.LinearKernel, slot_T: Sequence[int] | torch.Tensor) -> torch.Tensor:
    x_TI, segments = case.tensor(len(slot_T), case.in_features), group_by_slot(slot_T)
    y_TO = kernel.forward(x_TI, case.bias_O, segments)
    assert_close(y_TO, case.reference(x_TI, segments), case.bound("triton", x_TI, segments))
    return y_TO


@pytest.mark.parametrize("path", ["auto", "stacked", "modulated"])
@pytest.mark.parametrize("rank", [1, 7, 16])
def test_every_kind_of_term_in_one_step(rank: int, path: PathChoice) -> None:
    """Products, low-rank, weights, offsets, slices left alone: slots of every kind, and tokens of none."""
    case = Case(torch.float32, 70, seed=rank).add_slots(rank, 5)
    kernel = make(case, path)
    check(case, kernel, load("uniform", 23, 5, case.random))
    check(case, kernel, load("skewed", 7, 5, case.random))


def test_without_bias_and_with_one_token() -> None:
    case = Case(torch.float32, 33, (9,)).add_slots(3, 5)
    case.bias_O = None
    kernel = make(case)
    for slot in range(6):
        check(case, kernel, [slot])


def test_a_slot_is_rewritten_where_it_is() -> None:
    """Captured launches keep these addresses."""
    case = Case(torch.float32, 37).add_slots(4, 3)
    kernel = make(case)
    tables = (kernel.slots.table, kernel.slots.layout)
    before = [tensor.data_ptr() for tensor in tables]
    slot_T = [1, 2, 0, 3, 1, 2]
    check(case, kernel, slot_T)
    case.slots[1:] = [None, (None, case.terms(10, low=2), None), tuple(case.terms(size, 16) for size in case.sizes)]
    for slot in (1, 2, 3):
        kernel.write_slot(slot, case.slots[slot])
    check(case, kernel, slot_T)
    assert [tensor.data_ptr() for tensor in tables] == before


@pytest.mark.parametrize("path", ["stacked", "modulated"])
def test_tokens_without_adapter_are_not_touched_by_others(path: PathChoice) -> None:
    """A forced path: their numbers do not depend, to rounding, on which adapters are in the step."""
    case = Case(torch.float32, 64, (48, 16)).add_slots(5, 4)
    kernel = make(case, path)
    x_TI = case.tensor(9, 64)
    slot_T = [0, 1, 0, 2, 3, 0, 4, 4, 0]
    base = [t for t, slot in enumerate(slot_T) if slot == 0]
    alone = kernel.forward(x_TI, case.bias_O, group_by_slot([0] * 9))
    assert_close(
        alone, case.reference(x_TI, group_by_slot([0] * 9)), case.bound("triton", x_TI, group_by_slot([0] * 9))
    )
    for slot in (1, 2, 3, 4):
        kernel.write_slot(slot, tuple(case.terms(size, 5) for size in case.sizes))
    mixed = kernel.forward(x_TI, case.bias_O, group_by_slot(slot_T))
    torch.testing.assert_close(mixed[base], alone[base], rtol=0, atol=1e-5)
    assert not torch.allclose(mixed, alone, atol=1e-2)


def test_the_row_says_why_it_does_not_serve(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.float32, 16, (16,))
    monkeypatch.setattr(table, "_said", set())
    caplog.set_level("INFO", "flora_vllm.ops.table")

    def chosen(weight_OI: torch.Tensor | None, device: torch.device = CPU, **limits: int) -> str:
        return table.implementation_of(weight_OI, device, SlotLimits(**limits))

    weight_OI = case.weight_OI
    assert chosen(weight_OI) == "triton"
    assert chosen(weight_OI, rank=32) == "triton"
    for refused, reason in (
        ((weight_OI.bfloat16(),), "interpreter does not multiply bfloat16"),
        ((weight_OI.double(),), "dtype is torch.float64"),
        ((torch.zeros(16, 32)[:, ::2],), "not contiguous rows"),
        ((weight_OI, torch.device("cuda")), "device is cuda and TRITON_INTERPRET is 1"),
    ):
        assert chosen(*refused) == "torch"
        assert "not triton: " in caplog.messages[-1]
        assert reason in caplog.messages[-1]
    assert chosen(weight_OI, rank=33) == "torch"
    assert "not triton: ranks up to 33 are asked for, it has 32" in caplog.messages[-1]
    base = table.make_linear(None, case.base, case.sizes, DispatchRule(), 16, CPU)
    assert isinstance(base, TritonOpaqueLinear)


@pytest.mark.parametrize("path", ["auto", "stacked"])
def test_over_an_opaque_base(path: PathChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the base a step; low-rank terms alone are launches, eager and in a graph, the rest is torch's."""
    case = Case(torch.float32, 33, (24, 10)).add_slots(3, 4)
    case.slots.append((case.terms(24, low=4, plain="one"), case.terms(10, low=2, plain="one")))
    calls = []

    def base(x_TI: torch.Tensor) -> torch.Tensor:
        calls.append(x_TI.shape[0])
        return case.base(x_TI)

    kernel = table.make_linear(None, base, case.sizes, DispatchRule(path), 33, CPU, LIMITS)
    for slot, terms in enumerate(case.slots[1:], 1):
        kernel.write_slot(slot, terms)
    check(case, kernel, [1, 0, 2, 3, 5, 4, 5])
    launches = record_launches(monkeypatch)
    calls.clear()
    check(case, kernel, [5, 0, 5])
    assert calls == [3]
    assert [name_of(launch) for launch in launches] == ["flora_low_down", "flora_low_up"]
    assert [table.graph_rows_of(kernel, case.slots[slot]) for slot in (1, 5)] == [NEVER, 1]
    step, x_TI, segments = StepBuffers(4, 3, CPU), case.tensor(4, 33), group_by_slot([0, 5, 5, 0])
    step.fill(segments)
    y_TO = kernel.graph_form(x_TI, case.bias_O, step, 9)
    assert_close(y_TO, case.reference(x_TI, segments), case.bound("triton", x_TI, segments))


def test_the_check_before_serving_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_check.why_wrong.__wrapped__(CPU, torch.float32) is None
    write_slot = TritonLinear.write_slot
    monkeypatch.setattr(TritonLinear, "write_slot", lambda kernel, slot, terms: write_slot(kernel, slot % 3 + 1, terms))
    reason = triton_check.why_wrong.__wrapped__(CPU, torch.float32)
    assert reason is not None
    assert "the kernels: computes something else" in reason


def test_the_graph_check_before_serving_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once with empty slots; a graph that kept what was in a slot would be found out."""
    launches = record_launches(monkeypatch)

    def capture(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        run()
        launches.clear()
        return run(), lambda: replay(launches)

    assert triton_check.why_graphs_wrong.__wrapped__(CPU, torch.float32, capture) is None
    assert {name_of(launch) for launch in launches} == {"flora_stacked", "flora_low_up"}
    assert launches[0][3]["SPLIT"] > 1, "the sum of a cut product is tried too"
    monkeypatch.setattr(TritonLinear, "write_slot", lambda *_: None)
    reason = triton_check.why_graphs_wrong.__wrapped__(CPU, torch.float32, capture)
    assert reason is not None
    assert "a CUDA graph with the kernels: computes something else" in reason
