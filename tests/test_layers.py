"""The adapted linear behind one opaque op: identity by handle, hidden biases, torch.compile."""

import logging
import sys

import pytest
import torch

from flora_vllm import direct_calls
from flora_vllm.errors import StepError
from flora_vllm.layers import AdaptedLinear
from flora_vllm.ops.cpu import build as native_build
from flora_vllm.ops.cpu.linear import NativeLinear
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.rare import Swapped
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import SliceTerms, group_by_slot
from flora_vllm.ops.torch_linear import TorchLinear
from flora_vllm.step import Step

SIZES = (6, 4)
IN = 7
# float32 sums of at most 7 x 3 products of order 1 against a float64 loop: 21 * 6e-8 * |terms|, with room for 10.
TOLERANCE = 2e-5


@pytest.fixture(params=["torch", "native"], autouse=True)
def op(request, monkeypatch):
    """Every test runs on a layer whose calls Python takes, and on one whose calls are taken in C++."""
    if request.param == "native" and native_build.why_unavailable():
        pytest.skip(str(native_build.why_unavailable()))
    monkeypatch.setattr(sys.modules[__name__], "OP", request.param)
    return request.param


OP = "torch"


def _layer(seed: int = 0, *, hidden_bias: bool = False, step: Step | None = None):
    g = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(sum(SIZES), IN, generator=g)
    bias_O = torch.randn(sum(SIZES), generator=g)
    if OP == "native":
        kernel = NativeLinear(weight_OI, SIZES, DispatchRule())
    else:
        kernel = TorchLinear(weight_OI, lambda x: torch.nn.functional.linear(x, weight_OI), SIZES, DispatchRule(), IN)
    step = Step() if step is None else step
    return AdaptedLinear(kernel, step, SIZES, bias_O if hidden_bias else None), weight_OI, bias_O, step


def _terms(seed: int, *, swapped: bool = False):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        SliceTerms(
            plain_O=torch.randn(size, generator=g),
            a_RI=torch.randn(2, IN, generator=g),
            b_RO=torch.randn(2, size, generator=g),
            offset_O=torch.randn(size, generator=g),
            rare=(Swapped(torch.randn(size, generator=g), torch.randn(size, generator=g), 2),) if swapped else (),
        )
        for size in SIZES
    )


def _call(layer: AdaptedLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.flora.linear(x, bias, layer.handle, layer.out_features)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_op_serves_each_token_its_slot_through_any_leading_shape():
    layer, weight_OI, bias_O, step = _layer()
    terms = _terms(1)
    layer.write_slot(1, terms)
    step.set_mapping([4, 0, 4, 0, 0, 4], {4: 1})
    x = _x(2, 3, IN)
    y = _call(layer, x, bias_O)
    assert y.shape == (2, 3, sum(SIZES))
    wanted = reference_linear(x.view(6, IN), weight_OI, bias_O, SIZES, [None, terms], group_by_slot([1, 0, 1, 0, 0, 1]))
    torch.testing.assert_close(y.view(6, -1).double(), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_bias_added_by_the_caller_is_as_one_the_kernel_sees(swapped):
    """skip_bias_add: the caller adds the plain bias to our output; what acts on the whole sum acts on the bias too."""
    layer, weight_OI, bias_O, step = _layer(hidden_bias=True)
    step.set_mapping([4, 0, 4], {4: 1})
    x = _x(3, IN)
    for terms in (_terms(1, swapped=swapped), (None, _terms(1, swapped=swapped)[1]), None):
        layer.write_slot(1, terms)
        y = _call(layer, x) + bias_O
        wanted = reference_linear(x, weight_OI, bias_O, SIZES, [None, terms], group_by_slot([1, 0, 1]))
        torch.testing.assert_close(y.double(), wanted, atol=TOLERANCE, rtol=0)


def test_two_layers_are_told_apart_by_their_handle_in_one_compiled_graph():
    """One graph, two layers, changed steps and slots: nothing of the first run may be frozen into it."""
    step = Step()
    first, first_OI, bias_O, _ = _layer(0, step=step)
    second, second_OI, _, _ = _layer(1, step=step)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, handle: torch.ops.flora.linear(x, bias_O, handle, sum(SIZES)), fullgraph=True, backend="aot_eager"
    )
    x = _x(3, IN)
    terms = _terms(1)
    for layer, weight_OI in ((first, first_OI), (second, second_OI)):
        step.clear()
        torch.testing.assert_close(compiled(x, layer.handle), x @ weight_OI.T + bias_O, atol=TOLERANCE, rtol=0)
        layer.write_slot(1, terms)
        for mapping, slots in (([4, 0, 4], [1, 0, 1]), ([0, 4, 4], [0, 1, 1])):
            step.set_mapping(mapping, {4: 1})
            wanted = reference_linear(x, weight_OI, bias_O, SIZES, [None, terms], group_by_slot(slots))
            torch.testing.assert_close(compiled(x, layer.handle).double(), wanted, atol=TOLERANCE, rtol=0)


def test_the_op_has_a_fake_version_for_unknown_row_counts():
    layer, _, _, _ = _layer()
    torch.library.opcheck(
        torch.ops.flora.linear.default,
        (_x(3, IN), None, layer.handle, layer.out_features),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_the_op_marks_the_step_as_served_and_refuses_a_part_of_the_batch():
    layer, _, _, step = _layer()
    step.set_mapping([4, 4], {4: 1})
    step.begin()
    _call(layer, _x(1, IN))
    with pytest.raises(StepError, match="parts of the batch"):
        step.verify()
    step.begin()
    _call(layer, _x(2, IN))
    step.verify()


def test_a_layer_that_is_gone_is_not_served_by_another():
    layer, _, _, _ = _layer()
    handle = layer.handle.clone()
    del layer
    with pytest.raises(KeyError):
        torch.ops.flora.linear(_x(1, IN), None, handle, sum(SIZES))


def test_only_plain_calls_of_a_native_layer_are_taken_in_cpp(op, monkeypatch):
    layer, weight_OI, bias_O, step = _layer()
    terms = _terms(1)
    layer.write_slot(1, terms)
    asked: list[torch.Size] = []
    python = AdaptedLinear.forward
    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x, bias: asked.append(x.shape) or python(self, x, bias))
    _call(layer, _x(3, IN), bias_O)
    step.set_mapping([4, 0, 4], {4: 1})
    step.begin()
    plain = _call(layer, _x(3, IN), bias_O)
    step.verify()
    wanted = reference_linear(_x(3, IN), weight_OI, bias_O, SIZES, [None, terms], group_by_slot([1, 0, 1]))
    torch.testing.assert_close(plain.double(), wanted, atol=TOLERANCE, rtol=0)
    assert len(asked) == (0 if op == "native" else 2)
    asked.clear()
    torch.testing.assert_close(_call(layer, _x(3, IN).T.contiguous().T, bias_O), plain)
    torch.testing.assert_close(_call(layer, torch.cat([_x(3, IN)] * 2), bias_O)[:3], plain)
    step.expire(is_base=False)
    _call(layer, _x(3, IN))
    with pytest.raises(StepError, match="never said whose"):
        step.verify()
    assert len(asked) == 3


def test_a_layer_with_rare_terms_is_pythons_until_they_are_gone(op, monkeypatch):
    layer, weight_OI, bias_O, step = _layer()
    asked: list[torch.Size] = []
    python = AdaptedLinear.forward
    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x, bias: asked.append(x.shape) or python(self, x, bias))
    layer.write_slot(1, _terms(1, swapped=True))
    _call(layer, _x(3, IN), bias_O)
    assert len(asked) == (op == "torch")
    asked.clear()
    step.set_mapping([4, 0, 4], {4: 1})
    for terms in (_terms(1, swapped=True), _terms(1)):
        layer.write_slot(1, terms)
        wanted = reference_linear(_x(3, IN), weight_OI, bias_O, SIZES, [None, terms], group_by_slot([1, 0, 1]))
        y = _call(layer, _x(3, IN), bias_O)
        torch.testing.assert_close(y.double(), wanted, atol=TOLERANCE, rtol=0)
    assert len(asked) == (1 if op == "native" else 2)


def test_without_torchs_headers_calls_go_through_python_and_it_is_said(op, tmp_path, monkeypatch, caplog):
    broken = tmp_path / "torch_op.cpp"
    broken.write_text("#include <no/such/header.h>")
    monkeypatch.setattr(native_build, "TORCH_OP", broken)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    direct_calls._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            layer, weight_OI, _, _ = _layer()
            _layer()
        torch.testing.assert_close(_call(layer, _x(3, IN)), _x(3, IN) @ weight_OI.T, atol=TOLERANCE, rtol=0)
        assert "no/such/header.h" in caplog.text or op == "torch"
        assert caplog.text.count("go through Python") == (op == "native")
    finally:
        direct_calls._library.cache_clear()
