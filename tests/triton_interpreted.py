"""The Triton kernels against the reference, in Triton's interpreter; test_triton_linear.py runs it in a process."""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch

from flora_vllm.errors import ConfigError, StepError
from flora_vllm.ops import triton_kernels, triton_launch, triton_linear, triton_opaque
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms, group_by_slot
from flora_vllm.ops.triton_config import launch_config
from flora_vllm.ops.triton_linear import TritonLinear
from flora_vllm.ops.triton_step import StepBuffers

CPU = torch.device("cpu")
# Largest error relative to the output's root mean square. float32: sums of up to 200 products and 17 rows, each
# rounded once, stay within 40 half units (2^-24). float16: x * a is rounded once (2^-11, averaged over K), the
# modulated weight likewise, and the output once, where it is up to 5 times the root mean square: 8 half units.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 8 * 2**-11}


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """An output element that no kernel writes is then not a number."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Layer:
    """One layer's weight, slots and a step, with everything drawn from one seed."""

    def __init__(self, sizes: Sequence[int], in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        self.sizes = tuple(sizes)
        self.in_features = in_features
        self.dtype = dtype
        self.weight_OI = self.normal(sum(sizes), in_features) * in_features**-0.5
        self.bias_O = self.normal(sum(sizes))
        self.slots: list[LayerTerms | None] = [None]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def hadamard(self, rank: int, size: int, **other) -> SliceTerms:
        near_one = [(1 + 0.3 * self.normal(rank, n)).to(self.dtype) / rank**0.5 for n in (self.in_features, size)]
        return SliceTerms(a_RI=near_one[0], b_RO=near_one[1], **other)

    def gain(self, size: int) -> torch.Tensor:
        return (1 + 0.3 * self.normal(size)).to(self.dtype)

    def uniform(self, rank: int, **other) -> LayerTerms:
        return tuple(self.hadamard(rank, size, **other) for size in self.sizes)

    def step(self, counts: Sequence[int]) -> tuple[torch.Tensor, Segments]:
        """x and segments of a step with `counts[s]` tokens of slot s, shuffled."""
        slot_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        slot_T = slot_T[torch.randperm(len(slot_T), generator=self.random)]
        return self.normal(len(slot_T), self.in_features), group_by_slot(slot_T)

    def kernel(self, path: str = "auto", opaque: bool = False, **options) -> TritonLinear:
        weight_OI = None if opaque else self.weight_OI
        kernel = TritonLinear(
            weight_OI, self.base, self.sizes, DispatchRule(path), self.in_features, device=CPU, **options
        )
        for slot, terms in enumerate(self.slots):
            if slot:
                kernel.write_slot(slot, terms)
        return kernel

    def base(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI @ self.weight_OI.T

    def error(self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, bias: bool = True) -> float:
        bias_O = self.bias_O if bias else None
        expected = reference_linear(x_TI, self.weight_OI, bias_O, self.sizes, self.slots, segments)
        assert y_TO.shape == expected.shape
        error = (y_TO.double() - expected).abs().max() / expected.square().mean().sqrt()
        return float("inf") if error.isnan() else error.item()

    def check(self, kernel: TritonLinear, x_TI: torch.Tensor, segments: Segments, bias: bool = True) -> None:
        y_TO = kernel.forward(x_TI, self.bias_O if bias else None, segments)
        assert y_TO.dtype == self.dtype
        assert self.error(y_TO, x_TI, segments, bias) <= TOLERANCE[self.dtype]


def mixed_layer(dtype: torch.dtype = torch.float32) -> Layer:
    """Three slices; ranks that are no powers of two, an identity, gains, a slice and a slot left alone."""
    layer = Layer((96, 64, 32), 200, dtype)
    layer.slots += [
        layer.uniform(1),
        (layer.hadamard(3, 96), None, layer.hadamard(5, 32, identity=True)),
        (
            layer.hadamard(12, 96, gain_O=layer.gain(96)),
            SliceTerms(gain_O=layer.gain(64), gain_bias=True),
            layer.hadamard(16, 32, identity=True),
        ),
        None,
    ]
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("path", ["stacked", "modulated"])
def test_ragged_layer_with_ranks_mixed_in_one_step(path: str, dtype: torch.dtype) -> None:
    layer = Layer((192,), 200, dtype)
    layer.slots += [layer.uniform(rank) for rank in (1, 5, 16)]
    x_TI, segments = layer.step([2, 37, 5, 1])
    layer.check(layer.kernel(path), x_TI, segments)


@pytest.mark.parametrize("path", ["stacked", "modulated", "auto"])
def test_slices_with_their_own_terms(path: str) -> None:
    layer = mixed_layer()
    x_TI, segments = layer.step([5, 7, 4, 11, 3])
    layer.check(layer.kernel(path), x_TI, segments)


def test_auto_takes_both_ways_in_one_step() -> None:
    layer = Layer((80,), 72)
    layer.slots += [layer.uniform(8), layer.uniform(8), layer.uniform(1)]
    x_TI, segments = layer.step([70, 3, 33, 20])
    kernel = layer.kernel()
    assert [kernel._modulates(slot, len(rows)) for slot, rows in segments] == [True, False, True, False]
    layer.check(kernel, x_TI, segments, bias=False)


@pytest.mark.parametrize("path", ["stacked", "modulated"])
def test_odd_sizes_and_one_token(path: str) -> None:
    layer = Layer((7, 33), 37)
    layer.slots += [layer.uniform(2), layer.uniform(3, identity=True)]
    for counts in ([0, 1, 0], [1, 1, 2]):
        x_TI, segments = layer.step(counts)
        layer.check(layer.kernel(path), x_TI, segments)


def test_a_rank_above_the_tensor_cores_16() -> None:
    layer = Layer((48,), 64)
    layer.slots += [layer.uniform(20, identity=True)]
    x_TI, segments = layer.step([1, 4])
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path, max_rank=32), x_TI, segments)


def test_long_step_of_many_tiles_and_many_segments() -> None:
    """More segments than are located at once, more rows than a tile, in both kernels."""
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(1 + slot % 5) for slot in range(36)]
    x_TI, segments = layer.step([3] + [1 + slot % 4 for slot in range(36)])
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path), x_TI, segments)


def test_products_cut_along_in_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args, **kwargs):
        return dataclasses.replace(launch_config(*args, **kwargs), split=3)

    layer = mixed_layer()
    x_TI, segments = layer.step([2, 1, 2, 1, 0])
    monkeypatch.setattr(triton_linear, "launch_config", cut)
    layer.check(layer.kernel("stacked"), x_TI, segments)


def test_low_rank_terms_come_between_products_and_gain() -> None:
    layer = Layer((48, 16), 40)
    low = {"down_RI": layer.normal(4, 40) * 0.1, "up_RO": layer.normal(4, 48) * 0.1}
    layer.slots += [
        (SliceTerms(**low, gain_O=layer.gain(48), gain_bias=True), None),
        (layer.hadamard(2, 48, **low), layer.hadamard(2, 16, gain_O=layer.gain(16))),
    ]
    x_TI, segments = layer.step([2, 3, 4])
    for kernel in (layer.kernel("stacked"), layer.kernel("modulated"), layer.kernel(opaque=True)):
        layer.check(kernel, x_TI, segments)


def test_opaque_base_sees_the_rows_it_must_and_no_more() -> None:
    layer = mixed_layer()
    seen = []

    def base(x_TI: torch.Tensor) -> torch.Tensor:
        seen.append(x_TI.shape[0])
        return layer.base(x_TI)

    kernel = layer.kernel(opaque=True)
    kernel.base = base
    x_TI, segments = layer.step([2, 2, 1, 1, 1])
    layer.check(kernel, x_TI, segments)
    # Plain tokens one row; rank 1 in three slices; 3 + 5 and plain; 12 + 16 and plain.
    assert seen == [3 * 1 + 2 * 3 + 1 * 9 + 1 * 29]


def test_opaque_base_in_float16() -> None:
    layer = Layer((40,), 48, torch.float16)
    layer.slots += [layer.uniform(3)]
    x_TI, segments = layer.step([2, 3])
    layer.check(layer.kernel(opaque=True), x_TI, segments)


def test_swapped_factors_give_another_result() -> None:
    layer = Layer((64,), 64)
    (terms,) = layer.uniform(3)
    layer.slots += [(terms,)]
    x_TI, segments = layer.step([1, 6])
    for path in ("stacked", "modulated"):
        kernel = layer.kernel(path)
        layer.check(kernel, x_TI, segments)
        kernel.write_slot(1, (SliceTerms(a_RI=terms.b_RO, b_RO=terms.a_RI),))
        assert layer.error(kernel.forward(x_TI, layer.bias_O, segments), x_TI, segments) > 0.1


def test_swapped_factors_are_refused_where_the_shape_tells() -> None:
    layer = Layer((64,), 48)
    (terms,) = layer.uniform(3)
    with pytest.raises(ConfigError, match=r"a_RI has shape \(3, 64\), this slice needs \(3, 48\)"):
        layer.kernel().write_slot(1, (SliceTerms(a_RI=terms.b_RO, b_RO=terms.a_RI),))


class Recorder:
    """Stands for a kernel: launches it and keeps the launch, as a CUDA graph would."""

    def __init__(self, kernel, launches: list) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            # A graph keeps numbers and addresses.
            self._launches.append((self._kernel, grid, args, kwargs))
            self._kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("modulated", [False, True])
def test_recorded_launches_follow_slots_and_steps(modulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph does: the same launches on the same buffers, after slots and step were rewritten."""
    launches: list = []
    for name in ("flora_stacked", "flora_modulated"):
        monkeypatch.setattr(triton_kernels, name, Recorder(getattr(triton_kernels, name), launches))
    # Captured with empty slots, as at an engine's start.
    layer = Layer((96, 64, 32), 200)
    layer.slots += [None] * 4
    kernel = layer.kernel("modulated" if modulated else "stacked")
    step = StepBuffers(9, 6, CPU)
    x_TI, segments = layer.step([9])
    step.fill(segments, [modulated])
    y_TO = kernel.forward_step(x_TI, layer.bias_O, step, row_budget=40, modulated=modulated)
    assert layer.error(y_TO, x_TI, segments) <= 5e-6

    filled = mixed_layer().slots
    rewritten = [None, (None, layer.hadamard(6, 64, identity=True), None), None, layer.uniform(9), layer.uniform(1)]
    for slots, counts in ((filled, [2, 1, 1, 4, 1]), (rewritten, [1, 4, 0, 1, 3])):
        layer.slots = slots
        for slot in range(1, 5):
            kernel.write_slot(slot, slots[slot])
        other_TI, segments = layer.step(counts)
        x_TI.copy_(other_TI)
        step.fill(segments, [modulated] * len(segments.slots))
        y_TO.fill_(float("nan"))
        for recorded, grid, args, kwargs in list(launches):
            recorded[grid](*args, **kwargs)
        assert layer.error(y_TO, x_TI, segments) <= 5e-6


def test_a_grid_smaller_than_the_work_is_only_slower() -> None:
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(12), layer.uniform(1)]
    x_TI, segments = layer.step([3, 12, 40])
    step = StepBuffers(x_TI.shape[0], 3, CPU)
    for kinds in ([False] * 3, [True] * 3, [True, False, True]):
        step.fill(segments, kinds)
        y_TO = layer.kernel().forward_step(x_TI, layer.bias_O, step, row_budget=1, modulated=True)
        assert layer.error(y_TO, x_TI, segments) <= 5e-6


def test_opaque_base_beyond_its_budget_gives_nan_not_other_rows() -> None:
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(4)]
    x_TI, segments = layer.step([1, 3])
    step = StepBuffers(4, 2, CPU)
    step.fill(segments, [False] * 2)
    kernel = layer.kernel(opaque=True)
    assert kernel.stacked_rows(segments, [False] * 2) == 13
    y_TO = kernel.forward_step(x_TI, layer.bias_O, step, row_budget=20, modulated=False)
    assert layer.error(y_TO, x_TI, segments) <= 5e-6
    y_TO = kernel.forward_step(x_TI, layer.bias_O, step, row_budget=12, modulated=False)
    late = segments.rows_T[-1]
    assert y_TO[late].isnan().all()
    kept = torch.arange(4) != late
    exact = reference_linear(x_TI, layer.weight_OI, layer.bias_O, layer.sizes, layer.slots, segments)
    torch.testing.assert_close(y_TO[kept].double(), exact[kept], rtol=1e-5, atol=1e-5)


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
    kernel = layer.kernel("stacked", max_slots=1)
    kernel.write_slot(1, None)
    layer.slots[1] = None
    layer.check(kernel, x_TI, segments)
    with pytest.raises(ConfigError, match="slots are 1 to 1"):
        kernel.write_slot(2, None)
    with pytest.raises(ConfigError, match="slots are 1 to 1"):
        kernel.write_slot(0, layer.uniform(1))
    with pytest.raises(ConfigError, match="rank 17 is above this layer's maximum of 16"):
        kernel.write_slot(1, layer.uniform(17))
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
        "contiguous rows": x_TI.T.contiguous().T,
        "the slots' terms are torch.float32": x_TI.half(),
        "interpreter does not multiply bfloat16": x_TI.bfloat16(),
        "not torch.float64": x_TI.double(),
        r"needed are \(T, 48\)": x_TI[:, :40],
    }
    for message, bad_TI in cases.items():
        with pytest.raises(ConfigError, match=message):
            kernel.forward(bad_TI, None, segments)
    with pytest.raises(ConfigError, match="they must agree"):
        Layer((40,), 48).kernel().forward(x_TI.half(), None, segments)
    with pytest.raises(ConfigError, match="the bias has shape"):
        kernel.forward(x_TI, layer.bias_O[:8], segments)
    with pytest.raises(ConfigError, match="does not fit buffers"):
        StepBuffers(2, 2, CPU).fill(segments, [False, False])
    with pytest.raises(ConfigError, match="needs the layer's weight"):
        layer.kernel("modulated", opaque=True)
    with pytest.raises(ConfigError, match="ranks up to 32"):
        layer.kernel(max_rank=33)


def test_captured_steps_and_low_rank_terms_exclude_each_other() -> None:
    layer = Layer((40,), 48)
    low = (SliceTerms(down_RI=layer.normal(2, 48), up_RO=layer.normal(2, 40)),)
    x_TI, segments = layer.step([1, 1])
    step = StepBuffers(2, 2, CPU)
    step.fill(segments, [False, False])
    kernel = layer.kernel()
    kernel.forward_step(x_TI, None, step, 2, modulated=False)
    with pytest.raises(ConfigError, match="would be left out"):
        kernel.write_slot(1, low)
    kernel = layer.kernel()
    kernel.write_slot(1, low)
    with pytest.raises(StepError, match="low-rank"):
        kernel.forward_step(x_TI, None, step, 2, modulated=False)


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
    (terms,) = layer.uniform(3)
    wide = torch.cat([terms.a_RI, terms.a_RI], 1)
    layer.slots += [(SliceTerms(a_RI=wide[:, :64], b_RO=terms.b_RO),)]
    x_TI, segments = layer.step([1, 5])
    wide_TI = torch.cat([x_TI, x_TI], 1)
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path), wide_TI[:, :64], segments)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(1, 17))
@pytest.mark.parametrize(("path", "dtype"), [("stacked", torch.float32), ("modulated", torch.float16)])
def test_every_rank(rank: int, path: str, dtype: torch.dtype) -> None:
    layer = Layer((192,), 200, dtype, seed=rank)
    layer.slots += [layer.uniform(rank), layer.uniform(rank, identity=True), layer.uniform(1), layer.uniform(17 - rank)]
    x_TI, segments = layer.step([3, 5, 37, 1, 64])
    layer.check(layer.kernel(path), x_TI, segments)


def test_everything_ran_in_the_interpreter() -> None:
    assert triton_launch.INTERPRETED
    assert type(triton_opaque.flora_sum).__name__ == "InterpretedFunction"
