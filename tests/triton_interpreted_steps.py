"""Steps, budgets, slots and refusals of the Triton layer; test_triton_linear.py runs this in a process of its own."""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

import pytest
import torch
from triton_support import CPU, Layer, fresh_memory_is_nan, mixed_layer, name_of, record_launches, replay

from flora_vllm.errors import ConfigError
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.terms import SliceTerms

__all__ = ["fresh_memory_is_nan"]


def test_recorded_launches_follow_slots_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph does: the same launches on the same buffers, after slots and step were rewritten."""
    launches = record_launches(monkeypatch)
    # Captured with empty slots, as at an engine's start.
    layer = Layer((96, 64, 32), 200)
    layer.slots += [None] * 4
    kernel = layer.kernel("stacked")
    step = StepBuffers(9, 6, CPU)
    x_TI, segments = layer.step([9])
    step.fill(segments)
    y_TO = kernel.graph_form(x_TI, layer.bias_O, step, row_budget=40)
    assert layer.error(y_TO, x_TI, segments) <= 5e-6

    filled = mixed_layer().slots
    low = layer.low_rank(3, 64)
    rewritten = [
        None,
        (None, layer.hadamard(6, 64, plain_O=layer.weights(1), **low), SliceTerms(**layer.low_rank(16, 32))),
        None,
        layer.uniform(9),
        (SliceTerms(layer.weights(96), **layer.low_rank(1, 96), offset_O=layer.offset(96)), None, None),
    ]
    for slots, counts in ((filled, [2, 1, 1, 4, 1]), (rewritten, [1, 4, 0, 1, 3])):
        layer.slots = slots
        for slot in range(1, 5):
            kernel.write_slot(slot, slots[slot])
        other_TI, segments = layer.step(counts)
        x_TI.copy_(other_TI)
        step.fill(segments)
        y_TO.fill_(float("nan"))
        replay(launches)
        assert layer.error(y_TO, x_TI, segments) <= 5e-6


def test_launches_of_a_layer_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """None beyond the base's own product for IA3 and FLoRA of any rank, at most two for anything."""
    launched = record_launches(monkeypatch)
    layer = Layer((32, 16), 48)

    def weighted(**other: torch.Tensor) -> tuple[SliceTerms, None]:
        return SliceTerms(layer.weights(32), **other), None

    lora = (SliceTerms(torch.ones(1), **layer.low_rank(4, 32)), SliceTerms(torch.ones(1), **layer.low_rank(4, 16)))
    contents = [None, weighted(), layer.uniform(1), layer.uniform(8), lora, weighted(**layer.low_rank(2, 32))]
    layer.slots += contents[1:]
    base, down, up = "base", "flora_low_down", "flora_low_up"
    stacked, modulated = "flora_stacked", "flora_modulated"
    expected = {
        (3,): [base],
        (1, 2): [stacked],  # IA3
        (0, 0, 2): [stacked],
        (1, 1, 2): [stacked],
        (2, 0, 0, 1): [stacked],
        (2, 0, 0, 0, 3): [base, down, up],  # LoRA alone
        (1, 0, 2, 0, 1): [stacked, up],
        (1, 0, 0, 0, 0, 2): [stacked, up],  # DoRA
        (2, 0, 1, 40): [stacked, modulated],
        (0, 0, 0, 40): [modulated],
        (2, 1, 1, 40, 1, 1): [stacked, modulated, up],
    }
    kernel = layer.kernel()
    inner = kernel.base

    def counted_base(x_TI: torch.Tensor) -> torch.Tensor:
        launched.append(("base",))
        return inner(x_TI)

    kernel.base = counted_base
    for counts, names in expected.items():
        launched.clear()
        x_TI, segments = layer.step(counts)
        layer.check(kernel, x_TI, segments)
        assert [name_of(launch) for launch in launched] == names, counts
    for low_rank, names in ((16, [stacked, up]), (0, [stacked])):
        layer.slots[4:] = []
        kernel = layer.kernel(low_rank=low_rank)
        x_TI, segments = layer.step([1, 1, 1, 1])
        step = StepBuffers(4, 4, CPU)
        step.fill(segments)
        launched.clear()
        kernel.graph_form(x_TI, layer.bias_O, step, row_budget=16)
        assert [name_of(launch) for launch in launched] == names, "as a graph holds them"


def test_a_grid_smaller_than_the_work_is_only_slower() -> None:
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(12), layer.uniform(1)]
    x_TI, segments = layer.step([3, 12, 40])
    step = StepBuffers(x_TI.shape[0], 3, CPU)
    step.fill(segments)
    y_TO = layer.kernel().graph_form(x_TI, layer.bias_O, step, row_budget=1)
    assert layer.error(y_TO, x_TI, segments) <= 5e-6


# numpy warns of the products that the test is about.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_token_that_overflows_does_not_reach_the_others(bad: float) -> None:
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(3), layer.uniform(1)]
    x_TI, segments = layer.step([2, 4, 2])
    for path in ("stacked", "modulated"):
        clean = layer.kernel(path).forward(x_TI, layer.bias_O, segments)
        for token in (segments.rows_T[0], segments.rows_T[3]):
            spoilt_TI = x_TI.clone()
            spoilt_TI[token, 5] = bad
            y_TO = layer.kernel(path).forward(spoilt_TI, layer.bias_O, segments)
            others = torch.arange(x_TI.shape[0]) != token
            assert torch.equal(y_TO[others], clean[others])
            assert not y_TO[token].isfinite().any()


def test_slots_are_cleared_and_limits_hold() -> None:
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(3)]
    x_TI, segments = layer.step([1, 2])
    kernel = layer.kernel("stacked", slots=1)
    kernel.write_slot(1, None)
    layer.slots[1] = None
    layer.check(kernel, x_TI, segments)
    with pytest.raises(ConfigError, match="slots are 1 to 1"):
        kernel.write_slot(2, None)
    with pytest.raises(ConfigError, match="slots are 1 to 1"):
        kernel.write_slot(0, layer.uniform(1))
    with pytest.raises(ConfigError, match="rank 17 is above this layer's maximum of 16"):
        kernel.write_slot(1, layer.uniform(17))
    with pytest.raises(ConfigError, match="low rank 17 is above this layer's maximum of 16"):
        kernel.write_slot(1, (SliceTerms(**layer.low_rank(17, 40)),))
    with pytest.raises(ConfigError, match="come in pairs"):
        kernel.write_slot(1, (SliceTerms(a_RI=layer.normal(1, 48)),))
    with pytest.raises(ConfigError, match="2 slices of terms"):
        kernel.write_slot(1, layer.uniform(1) * 2)


def test_launches_refuse_what_kernels_cannot_do() -> None:
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(3)]
    x_TI, segments = layer.step([1, 2])
    kernel = layer.kernel()
    cases = {
        "x is torch.float16 on cpu": x_TI.half(),
        r"needed are \(T, 48\)": x_TI[:, :40],
    }
    for message, bad_TI in cases.items():
        with pytest.raises(ConfigError, match=message):
            kernel.forward(bad_TI, None, segments)
    for dtype, message in ((torch.bfloat16, "interpreter does not multiply"), (torch.float64, "not torch.float64")):
        with pytest.raises(ConfigError, match=message):
            Layer((40,), 48, dtype).kernel()
    with pytest.raises(ConfigError, match="the bias has shape"):
        kernel.forward(x_TI, layer.bias_O[:8], segments)
    with pytest.raises(ConfigError, match="does not fit buffers"):
        StepBuffers(2, 2, CPU).fill(segments)
    with pytest.raises(ConfigError, match="ranks up to 32"):
        layer.kernel(rank=33)


def test_no_adapter_at_all_is_the_base_call() -> None:
    layer = Layer((40,), 48)
    x_TI, _ = layer.step([3])
    assert torch.equal(layer.kernel().forward(x_TI, layer.bias_O, None), layer.base(x_TI) + layer.bias_O)


def test_views_with_strides_and_odd_addresses() -> None:
    """x as a slice of a wider tensor, a weight that starts off a 16-byte boundary, terms that are views."""
    layer = Layer((48,), 64)
    buffer = torch.empty(48 * 64 + 1)
    buffer[1:] = layer.weight_OI.flatten()
    layer.weight_OI = buffer[1:].view(48, 64)
    a_RI, b_RO = layer.factors(3, 48)
    layer.slots += [(SliceTerms(a_RI=torch.cat([a_RI, a_RI], 1)[:, :64], b_RO=b_RO),)]
    x_TI, segments = layer.step([1, 5])
    wide_TI = torch.cat([x_TI, x_TI], 1)
    for path in ("stacked", "modulated"):
        for view_TI in (wide_TI[:, :64], x_TI.T.contiguous().T):
            layer.check(layer.kernel(path), view_TI, segments)
