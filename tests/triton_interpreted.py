"""The Triton kernels' numbers against the reference; test_triton_linear.py runs this in a process of its own."""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

import dataclasses

import pytest
import torch
from triton_support import Layer, fresh_memory_is_nan, mixed_layer

from flora_vllm.errors import ConfigError
from flora_vllm.ops.dispatch import PathChoice
from flora_vllm.ops.gpu import launch as triton_launch
from flora_vllm.ops.gpu import linear as triton_linear
from flora_vllm.ops.gpu import low_rank as triton_low_rank
from flora_vllm.ops.gpu.config import stacked_config
from flora_vllm.ops.terms import SliceTerms

__all__ = ["fresh_memory_is_nan"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("path", ["stacked", "modulated"])
def test_ragged_layer_with_ranks_mixed_in_one_step(path: PathChoice, dtype: torch.dtype) -> None:
    layer = Layer((192,), 200, dtype)
    layer.slots += [layer.uniform(rank) for rank in (1, 5, 16)]
    x_TI, segments = layer.step([2, 37, 5, 1])
    layer.check(layer.kernel(path), x_TI, segments)


@pytest.mark.parametrize("path", ["stacked", "modulated", "auto"])
def test_slices_with_their_own_terms(path: PathChoice) -> None:
    layer = mixed_layer()
    x_TI, segments = layer.step([5, 7, 4, 11, 3])
    layer.check(layer.kernel(path), x_TI, segments)


def test_auto_takes_both_ways_in_one_step() -> None:
    layer = Layer((80,), 72)
    layer.slots += [layer.uniform(8), layer.uniform(8), layer.uniform(1)]
    # One token of rank 8 costs 8 rows stacked, more modulated, whatever the constants.
    x_TI, segments = layer.step([70, 1, 33, 20])
    kernel = layer.kernel()
    thresholds = kernel.slots.modulate_from
    assert [len(rows) >= thresholds[slot] for slot, rows in segments] == [True, False, True, False]
    layer.check(kernel, x_TI, segments, bias=False)


@pytest.mark.parametrize("path", ["stacked", "modulated"])
def test_odd_sizes_and_one_token(path: PathChoice) -> None:
    layer = Layer((7, 33), 37)
    layer.slots += [layer.uniform(2), layer.uniform(3, plain_O=layer.weights(1))]
    for counts in ([0, 1, 0], [1, 1, 2]):
        x_TI, segments = layer.step(counts)
        layer.check(layer.kernel(path), x_TI, segments)


def test_a_rank_above_the_tensor_cores_16() -> None:
    layer = Layer((48,), 64)
    layer.slots += [layer.uniform(20, plain_O=layer.weights(48))]
    x_TI, segments = layer.step([1, 4])
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path, rank=32), x_TI, segments)


def test_long_step_of_many_tiles_and_many_segments() -> None:
    """More segments than are located at once, more rows than a tile, in both kernels."""
    layer = Layer((40,), 48)
    layer.slots += [layer.uniform(1 + slot % 5) for slot in range(36)]
    x_TI, segments = layer.step([3] + [1 + slot % 4 for slot in range(36)])
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path, slots=36), x_TI, segments)


def test_products_cut_along_in_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args, **kwargs):
        return dataclasses.replace(stacked_config(*args, **kwargs), split=3)

    layer = mixed_layer()
    x_TI, segments = layer.step([2, 1, 2, 1, 0])
    monkeypatch.setattr(triton_linear, "stacked_config", cut)
    layer.check(layer.kernel("stacked"), x_TI, segments)


def test_low_rank_terms_beside_products_and_offsets() -> None:
    layer = Layer((48, 16), 40)
    low = layer.low_rank(4, 48)
    layer.slots += [
        (SliceTerms(layer.weights(48), **low, offset_O=layer.offset(48)), None),
        (layer.hadamard(2, 48, **low), layer.hadamard(2, 16, offset_O=layer.offset(16))),
    ]
    x_TI, segments = layer.step([2, 3, 4])
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path), x_TI, segments)


def test_a_sum_without_plain_product() -> None:
    """Nothing but an offset, and nothing but a low-rank term: no W x in them."""
    layer = Layer((48, 16), 40)
    layer.slots += [(SliceTerms(offset_O=layer.offset(48)), None), (SliceTerms(**layer.low_rank(2, 48)), SliceTerms())]
    x_TI, segments = layer.step([2, 3, 4])
    for path in ("stacked", "modulated"):
        layer.check(layer.kernel(path), x_TI, segments)


def test_swapped_factors_give_another_result() -> None:
    layer = Layer((64,), 64)
    a_RI, b_RO = layer.factors(3, 64)
    layer.slots += [(SliceTerms(a_RI=a_RI, b_RO=b_RO),)]
    x_TI, segments = layer.step([1, 6])
    for path in ("stacked", "modulated"):
        kernel = layer.kernel(path)
        layer.check(kernel, x_TI, segments)
        kernel.write_slot(1, (SliceTerms(a_RI=b_RO, b_RO=a_RI),))
        assert layer.error(kernel.forward(x_TI, layer.bias_O, segments), x_TI, segments) > 0.1


def test_swapped_factors_are_refused_where_the_shape_tells() -> None:
    layer = Layer((64,), 48)
    a_RI, b_RO = layer.factors(3, 64)
    with pytest.raises(ConfigError, match=r"a_RI has shape \(3, 64\), this slice needs \(3, 48\)"):
        layer.kernel().write_slot(1, (SliceTerms(a_RI=b_RO, b_RO=a_RI),))


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(1, 17))
@pytest.mark.parametrize(("path", "dtype"), [("stacked", torch.float32), ("modulated", torch.float16)])
def test_every_rank(rank: int, path: PathChoice, dtype: torch.dtype) -> None:
    layer = Layer((192,), 200, dtype, seed=rank)
    layer.slots += [
        layer.uniform(rank),
        layer.uniform(rank, plain_O=layer.weights(192)),
        layer.uniform(1),
        layer.uniform(17 - rank),
    ]
    x_TI, segments = layer.step([3, 5, 37, 1, 64])
    layer.check(layer.kernel(path), x_TI, segments)


def test_everything_ran_in_the_interpreter() -> None:
    assert triton_launch.INTERPRETED
    assert type(triton_low_rank.flora_low_up).__name__ == "InterpretedFunction"
