"""The training benchmark on a tiny random model: its summary, and that it notices examples in the wrong adapter."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_train

from flora_vllm.training import loop
from flora_vllm.training.build import load_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


def test_quick_run_prints_its_summary_and_writes_nothing(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train.harness, "RESULTS", tmp_path)
    bench_train.main(["--quick", "--base", str(base)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    flora, lora = result["batched_over_sequential_flora"], result["batched_over_sequential_lora"]
    assert result["batched_over_sequential"] == pytest.approx((flora * lora) ** 0.5, abs=2e-3)
    assert min(flora, lora) > 0
    assert 0 <= result["largest_loss_difference"] < 1e-2
    assert result["quick"] is True
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["flora", "lora"])
def test_examples_in_the_wrong_adapter_are_noticed(base, method, monkeypatch):
    right = loop.example_adapters

    @contextlib.contextmanager
    def wrong(model, names):
        with right(model, [*names[1:], names[0]]):
            yield

    monkeypatch.setattr(loop, "example_adapters", wrong)
    model, tokenizer = load_base(str(base))
    with pytest.raises(AssertionError, match="went through another adapter"):
        bench_train.measure(model, tokenizer, method, length=16, steps=4)
