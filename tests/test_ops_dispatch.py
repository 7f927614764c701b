"""The dispatch rule, its calibration and its cache; which implementation serves what; how the native op is built."""

import ctypes
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from ops_support import Case

from flora_vllm.errors import ConfigError
from flora_vllm.ops import table
from flora_vllm.ops.cpu import build as native_build
from flora_vllm.ops.cpu.linear import NativeLinear
from flora_vllm.ops.dispatch import NEVER, PATHS, DispatchRule, calibrate
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.torch_linear import TorchLinear

CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty user cache, and a process that has built nothing yet."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    for remembered in (native_build._load, native_build._digest):
        remembered.cache_clear()
        monkeypatch.setattr(native_build, remembered.__name__, remembered)
    yield tmp_path
    native_build._load.cache_clear()
    native_build._digest.cache_clear()


def test_the_rule_takes_the_cheaper_path():
    rule = DispatchRule("auto", constant=15.0, slope=1.0)
    assert rule.modulate_from(products=1, scaled=1) == NEVER
    # Eight products: stacked costs 8 rows a token, modulated one row and 23 for the segment.
    assert rule.modulate_from(products=8, scaled=8) == rule.modulate_from(products=8, scaled=7) == 4
    # Equal costs stay stacked: 2 * 12 rows either way.
    assert DispatchRule("auto", constant=8.0, slope=2.0).modulate_from(products=2, scaled=1) == 13


@pytest.mark.parametrize("path", PATHS)
def test_a_forced_path_holds_for_every_size_and_only_scaled_products_are_modulated(path):
    rule = DispatchRule(path)
    assert rule.modulate_from(products=1, scaled=0) == NEVER
    forced = {rule.modulate_from(products, products) for products in (1, 2, 64)}
    assert forced == {"stacked": {NEVER}, "modulated": {0}}.get(path, forced)


@pytest.mark.parametrize("fault", [{"path": "fast"}, {"constant": -1.0}, {"slope": -0.1}])
def test_a_senseless_rule_is_refused(fault):
    with pytest.raises(ConfigError):
        DispatchRule(**fault)


def test_calibration_measures_once_and_then_reads(own_cache):
    makes = []

    def make(weight_OI, rule):
        makes.append(rule.path)
        return TorchLinear(weight_OI, lambda x: x @ weight_OI.T, (weight_OI.shape[0],), rule, weight_OI.shape[1])

    start = time.thread_time()
    rule = calibrate(make, "torch", 64, 96, torch.float32, CPU, "auto")
    assert time.thread_time() - start < 2
    assert makes == ["modulated"]
    assert rule.constant >= 0
    assert rule.slope >= 0
    again = calibrate(make, "torch", 64, 96, torch.float32, CPU, "stacked")
    assert (again.path, again.constant, again.slope) == ("stacked", rule.constant, rule.slope)
    assert len(makes) == 1
    calibrate(make, "torch", 64, 97, torch.float32, CPU)
    assert len(makes) == 2
    for file in (own_cache / "dispatch").iterdir():
        file.write_text("{torn")
    calibrate(make, "torch", 64, 96, torch.float32, CPU)
    assert len(makes) == 3


def test_nothing_is_measured_for_a_layer_that_cannot_modulate(own_cache, monkeypatch):
    def never(*_args):
        raise AssertionError("a measurement")

    monkeypatch.setenv("FLORA_NATIVE", "0")
    monkeypatch.setattr(table, "calibrate", never)
    with pytest.raises(AssertionError, match="a measurement"):
        table.calibrated_rule("auto", 64, 96, torch.float32, CPU)
    for path in PATHS:
        assert table.calibrated_rule(path, 64, 96, torch.float32, CPU, readable=False).path == path
    assert not (own_cache / "dispatch").exists()


def test_the_table_serves_each_layer_by_its_first_fit(monkeypatch, caplog):
    case = Case(torch.float32, 8)
    monkeypatch.setattr(table, "_said", set())
    monkeypatch.setenv("FLORA_NATIVE", "auto")
    caplog.set_level(logging.INFO, "flora_vllm.ops.table")

    def made(weight_OI):
        return table.make_linear(weight_OI, case.base, case.sizes, DispatchRule(), 8, CPU)

    for _ in range(2):
        assert isinstance(made(case.weight_OI), NativeLinear)
    told = [record.message for record in caplog.records if record.name == "flora_vllm.ops.table"]
    assert told == ["adapted linears run on the native op"]
    assert isinstance(made(None), OpaqueLinear)
    assert isinstance(made(case.weight_OI.half()), TorchLinear)
    assert "does not show its weight" in caplog.text
    assert "float16" in caplog.text
    if not torch.cuda.is_available():
        assert table.implementation_of(case.weight_OI, torch.device("cuda")) == "torch"
        assert "not native: device is cuda; not triton: there is no NVIDIA GPU" in caplog.text


def test_the_environment_chooses(monkeypatch):
    case = Case(torch.float32, 8)
    monkeypatch.setenv("FLORA_NATIVE", "0")
    assert table.implementation_of(case.weight_OI, CPU) == "torch"
    monkeypatch.setenv("FLORA_NATIVE", "yes")
    with pytest.raises(ConfigError, match="auto, 0 or 1"):
        table.implementation_of(case.weight_OI, CPU)


@pytest.mark.parametrize(("compiler", "words"), [("no-such-compiler", "no-such-compiler"), ("false", "ended with 1")])
def test_without_a_working_compiler_torch_serves_and_the_reason_is_given(own_cache, monkeypatch, compiler, words):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("FLORA_NATIVE", "auto")
    weight_OI = torch.zeros(2, 2)
    assert table.implementation_of(weight_OI, CPU) == "torch"
    reason = native_build.why_unavailable()
    assert reason is not None
    assert words in reason
    monkeypatch.setenv("FLORA_NATIVE", "1")
    with pytest.raises(ConfigError, match=words):
        table.implementation_of(weight_OI, CPU)


def test_the_compilers_words_are_in_the_error(own_cache, monkeypatch):
    sources = own_cache / "broken"
    sources.mkdir(parents=True)
    (sources / "linear.cpp").write_text("int main() { return nonsense; }")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setenv("FLORA_NATIVE", "auto")
    assert "nonsense" in (native_build.why_unavailable() or "")


def _build(barrier, compiler_log: str) -> None:
    """In a process of its own: build at the same moment as the others, through a compiler that keeps a log."""
    os.environ["CXX"] = compiler_log
    barrier.wait()
    native_build.load_library()


def test_processes_that_start_together_compile_once(own_cache, tmp_path):
    """The log of a wrapped compiler: one `-c`, one `-shared`, whoever came first."""
    log, wrapper = tmp_path / "log", tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec c++ "$@"\n')
    wrapper.chmod(0o755)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_build, args=(barrier, str(wrapper))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    calls = log.read_text().splitlines()
    assert sum(" -c " in call for call in calls) == 1
    assert sum("-shared" in call for call in calls) == 1
    (folder,) = (own_cache / "native").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["flora.so", "lock"]


def test_the_op_runs_on_torchs_own_threads():
    """Same OpenMP runtime: no thread is added to those that torch has, and torch's count is the op's."""
    torch.set_num_threads(2)
    torch.randn(512, 512).square().sum()
    case = Case(torch.float32, 64, (256,))
    kernel, x_TI = case.make("native"), case.tensor(64, 64)
    before = _threads()
    for _ in range(3):
        kernel.forward(x_TI, None, None)
    assert _threads() == before
    # The library brings no runtime, so its calls were bound to the one that is loaded for everybody.
    assert not hasattr(native_build.load_library(), "GOMP_parallel")
    assert hasattr(ctypes.CDLL(None), "GOMP_parallel")


def _threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def test_a_packed_layer_counts_its_bytes():
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype, 33, (70, 5))
        kernel = NativeLinear(case.weight_OI, case.sizes, DispatchRule())
        lanes = 33 if dtype == torch.float32 else 17
        assert kernel.nbytes == 3 * 64 * lanes * 4
        kernel.write_slot(3, (case.terms(70, rank=2), None))
        with_terms = kernel.nbytes
        kernel.write_slot(3, None)
        assert kernel.nbytes == 3 * 64 * lanes * 4 < with_terms
