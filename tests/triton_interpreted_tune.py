"""FLORA_TUNE=1 with a timer that is told what to prefer; test_triton_linear.py runs this in a process of its own."""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton_support import Layer, fresh_memory_is_nan, name_of, record_launches

from flora_vllm.errors import ConfigError
from flora_vllm.ops import table
from flora_vllm.ops.gpu import launch as triton_launch
from flora_vllm.ops.gpu import tune as triton_tune
from flora_vllm.ops.gpu.linear import TritonLinear, build_name

__all__ = ["fresh_memory_is_nan"]

ROWS, TOKENS, RANK = (6, 40), 20, 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    monkeypatch.setenv("FLORA_TUNE", "1")
    monkeypatch.setattr(triton_tune, "ROWS", ROWS)
    monkeypatch.setattr(triton_tune, "TOKENS", TOKENS)
    return tmp_path / "tuned"


@pytest.fixture
def layer() -> Layer:
    return Layer((64, 32), 64)


def tuned(layer: Layer, timer: Callable | None = None) -> TritonLinear:
    kernel = layer.kernel(slots=3, rank=RANK, low_rank=0)
    triton_tune.tune(kernel, timer)
    return kernel


def never(_call: Callable) -> float:
    raise AssertionError("timed again")


def test_what_was_fastest_is_launched_and_kept(
    layer: Layer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, triton_tune.__name__)
    launches = record_launches(monkeypatch)

    def timer(call: Callable) -> float:
        """To which few warps of a cut product, and few tokens of a modulated tile, are the fastest."""
        launches.clear()
        call()
        (launch,) = launches
        return launch[3]["num_warps"] if name_of(launch) == "flora_stacked" else launch[3]["BM"]

    kernel = tuned(layer, timer)
    assert not kernel.slots.product_bits, "its slots are empty again"
    (file,) = cache.iterdir()
    for again in (kernel, tuned(layer, never)):
        layer.slots = [None, layer.uniform(RANK), layer.uniform(1), layer.uniform(2)]
        for slot, terms in enumerate(layer.slots[1:], 1):
            again.write_slot(slot, terms)
        launches.clear()
        x_TI, segments = layer.step([1, 40, 1, 2])
        layer.check(again, x_TI, segments)
        of = {name_of(launch): launch[3] for launch in launches}
        assert of["flora_stacked"]["num_warps"] == 4
        assert of["flora_modulated"]["BM"] == 32, "half of what arithmetic chooses"
    assert sum("at first 8000000.0" in message for message in caplog.messages) == len(ROWS)
    file.write_text("{torn")
    with pytest.raises(AssertionError, match="timed again"):
        tuned(layer, never)
    with pytest.raises(AssertionError, match="timed again"):
        tuned(Layer((64, 32), 48), never)  # another shape


def test_what_computes_something_else_or_does_not_run_is_left_out(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stacked = triton_launch.launch_stacked

    def off(layer, x_TI, y_TO, bias_O, step, config, *rest) -> None:
        if config.m == 128:
            raise RuntimeError("out of shared memory")
        stacked(layer, x_TI, y_TO, bias_O, step, config, *rest)
        if config.warps == 4:
            y_TO[0, 0] += 1

    monkeypatch.setattr(triton_launch, "launch_stacked", off)
    kernel = tuned(layer, lambda _: 1.0)
    for rows in ROWS:
        config = kernel.stacked_with(rows, RANK + 1)
        assert (config.m, config.warps) == (64, 8)
    assert "computes something else on this GPU" in caplog.text


def test_nothing_is_timed_unless_asked_for(layer: Layer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tuned = build_name()
    monkeypatch.setenv("FLORA_TUNE", "0")
    assert build_name() != as_tuned, "the constants of dispatch are measured with what is launched"
    tuned(layer, never)
    assert not cache.exists()
    monkeypatch.setenv("FLORA_TUNE", "yes")
    with pytest.raises(ConfigError, match="FLORA_TUNE='yes' is not allowed; use 0 or 1"):
        tuned(layer, never)


def test_an_engines_layer_is_tuned_where_it_is_made(layer: Layer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_NATIVE", "0")
    monkeypatch.setattr(triton_tune, "TOKENS", 0)
    rule = table.DispatchRule("stacked")
    limits = table.SlotLimits(slots=2, rank=2, low_rank=0)
    kernel = table.make_linear(layer.weight_OI, layer.base, layer.sizes, rule, 64, torch.device("cpu"), limits)
    assert isinstance(kernel, TritonLinear)
    assert len(list(cache.iterdir())) == 1
