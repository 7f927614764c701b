"""The adapted layer against the equation: both compute paths, their gradients, initialisation, bias, opaque bases."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora_vllm.errors import ConfigError
from flora_vllm.training import FloraConfig, FloraLinear
from flora_vllm.training import layer as layer_module
from flora_vllm.training.modulate import modulated_product, prefers_modulated, stacked_product

PATHS = {"stacked": False, "modulated": True}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(layer_module, "prefers_modulated", lambda *_args: PATHS[request.param])
    return request.param


class Opaque(nn.Module):
    """A base layer whose weight can't be read, as quantised ones: only its call and its bias are known."""

    def __init__(self, linear: nn.Linear, bias_is_known: bool = True) -> None:
        super().__init__()
        self.hidden = [linear]
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if bias_is_known:
            self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden[0](x)


def make(base: nn.Module, rank: int, reduction: str = "mean", identity: bool = False, **fields) -> FloraLinear:
    torch.manual_seed(1)
    config = FloraConfig(r=rank, reduction=reduction, init_weights=identity, **fields)
    return FloraLinear(base, "default", rank, config)


def reference(layer: FloraLinear, weight_OI, bias_O, x_TI, name: str = "default") -> torch.Tensor:
    """y[t] = c Σ_j B[:, j] ∘ (W (A[j] ∘ x[t])) + bias, token by token."""
    a_RI, b_OR = layer.flora_A[name].weight, layer.flora_B[name].weight
    scale = 1 / len(a_RI) if layer.reduction[name] == "mean" else 1.0
    rows = [scale * sum(b_OR[:, j] * (weight_OI @ (a_RI[j] * x_I)) for j in range(len(a_RI))) + bias_O for x_I in x_TI]
    return torch.stack(rows)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_forward_is_the_equation_and_the_bias_is_not_scaled(path, rank, reduction):
    base = nn.Linear(6, 7).double()
    layer = make(base, rank, reduction).double()
    x_TI = torch.randn(4, 6).double()
    # float64, sums of at most 30 products of order 1: rounding stays below 1e-13.
    torch.testing.assert_close(layer(x_TI), reference(layer, base.weight, base.bias, x_TI), rtol=0, atol=1e-13)


def test_conv1d_stores_its_weight_the_other_way_round(path):
    base = Conv1D(7, 6).double()
    nn.init.normal_(base.bias)
    layer = make(base, 2).double()
    x_TI = torch.randn(3, 6).double()
    torch.testing.assert_close(layer(x_TI), reference(layer, base.weight.T, base.bias, x_TI), rtol=0, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_starts_as_the_exact_identity(path, rank, reduction):
    base = nn.Linear(6, 7)
    layer = make(base, rank, reduction, identity=True)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), base(x) if rank == 1 else nn.functional.linear(x, base.weight) + base.bias)
    product = layer.flora_B["default"].weight @ layer.flora_A["default"].weight
    assert torch.equal(product, torch.full_like(product, rank if reduction == "mean" else 1))


@pytest.mark.parametrize("product", [stacked_product, modulated_product])
@pytest.mark.parametrize("rank", [1, 3])
def test_gradcheck(product, rank):
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.float64)
    tensors = (torch.randn(2, 3, 5), torch.randn(rank, 5), torch.randn(4, rank))
    x, a, b = (t.double().requires_grad_() for t in tensors)
    if product is stacked_product:
        assert torch.autograd.gradcheck(lambda *t: stacked_product(lambda z: z @ weight.T, *t), (x, a, b))
    else:
        weight.requires_grad_()
        assert torch.autograd.gradcheck(modulated_product, (weight, x, a, b))


def test_both_paths_agree_in_value_and_gradient(monkeypatch):
    results = []
    for modulated in (False, True):
        monkeypatch.setattr(layer_module, "prefers_modulated", lambda *_args, choice=modulated: choice)
        torch.manual_seed(0)
        layer = make(nn.Linear(8, 6), 3).double()
        x = torch.randn(2, 5, 8).double().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients = [layer.flora_A["default"].weight.grad, layer.flora_B["default"].weight.grad, x.grad]
        results.append([y.detach(), *gradients])
    for stacked, modulated in zip(*results, strict=True):
        torch.testing.assert_close(stacked, modulated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias_is_known", [True, False])
def test_opaque_base_gives_the_same_as_a_readable_one(bias_is_known):
    linear = nn.Linear(6, 7)
    plain, opaque = make(linear, 3), make(Opaque(linear, bias_is_known), 3)
    assert opaque._readable_weight() is None
    assert plain._readable_weight() is linear.weight
    x = torch.randn(4, 6)
    y = opaque(x)
    # The opaque call rounds W x + bias once more before the bias is taken off: a few float32 ulps of order-1 values.
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert opaque.flora_A["default"].weight.grad.abs().sum() > 0


def test_weight_and_bias_may_be_plain_tensors_as_under_fsdp():
    linear = nn.Linear(6, 7)
    layer, x = make(linear, 2), torch.randn(3, 6)
    expected = layer(x)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    del linear.weight, linear.bias
    linear.weight, linear.bias = weight, bias
    assert torch.equal(layer(x), expected)


def test_a_base_with_hooks_or_a_replaced_forward_is_called():
    linear = nn.Linear(6, 7)
    layer = make(linear, 1)
    called = []
    linear.register_forward_hook(lambda *_args: called.append(1))
    layer(torch.randn(2, 6))
    assert called


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_components_differ_and_rank_is_full_after_training(reduction):
    """The symmetry argument: with equal components all gradients are equal; ours start unequal and end at rank r."""
    torch.manual_seed(0)
    base = nn.Linear(16, 12)
    layer = make(base, 3, reduction, identity=True)
    target_OI = base.weight.detach() * (1 + 0.5 * torch.randn(12, 3) @ torch.randn(3, 16))
    base.requires_grad_(False)
    optimizer = torch.optim.Adam([layer.flora_A["default"].weight, layer.flora_B["default"].weight], lr=2e-2)
    x = torch.randn(256, 16)
    first = last = None
    for _ in range(300):
        loss = (layer(x) - x @ target_OI.T - base.bias).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first if first is not None else loss.item(), loss.item()
    assert last < 0.1 * first
    a_RI, b_OR = layer.flora_A["default"].weight.detach(), layer.flora_B["default"].weight.detach()
    singular = torch.linalg.svdvals(b_OR @ a_RI)
    assert (singular[:3] > 0.05 * singular[0]).all()
    assert singular[3] < 1e-4 * singular[0]
    cosines = nn.functional.normalize(a_RI, dim=1) @ nn.functional.normalize(a_RI, dim=1).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.99


def test_merge_is_the_forward_and_unmerge_is_bitwise():
    base = nn.Linear(6, 7)
    before = copy.deepcopy(base.state_dict())
    layer = make(base, 2)
    x = torch.randn(4, 6)
    expected = layer(x)
    layer.merge(safe_merge=True)
    assert not torch.equal(base.weight, before["weight"])
    # float32, one product merged instead of applied: rounding of order 1e-6 on values of order 1.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert all(torch.equal(base.state_dict()[k], before[k]) for k in before)


def test_a_model_that_is_cast_while_merged_is_unmerged_in_its_new_dtype():
    base = nn.Linear(6, 7)
    before = base.weight.detach().clone()
    layer = make(base, 2)
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(base.weight, before.to(torch.bfloat16))
    assert layer(torch.randn(4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_safe_merge_refuses_and_changes_nothing():
    base = nn.Linear(6, 7)
    before = base.weight.detach().clone()
    layer = make(base, 1)
    layer.flora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(base.weight, before)
    assert not layer.merged


def test_two_active_adapters_add_their_updates():
    base = nn.Linear(6, 7).double()
    layer = make(base, 1).double()
    torch.manual_seed(2)
    layer.update_layer("other", 3, FloraConfig(r=3, reduction="sum", init_weights=False))
    layer.set_adapter(["default", "other"])
    x = torch.randn(4, 6).double()
    parts = [reference(layer, base.weight, base.bias, x, name) for name in ("default", "other")]
    torch.testing.assert_close(layer(x), parts[0] + parts[1] - base(x), rtol=0, atol=1e-12)
    merged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), merged, rtol=0, atol=1e-12)


def test_dropout_drops_the_update_and_never_the_base():
    base = nn.Linear(6, 7)
    layer = make(base, 2, identity=True, flora_dropout=0.5)
    x = torch.randn(5, 6)
    # At the identity the update is zero whatever is dropped; the two base products round apart.
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)
    layer.flora_B["default"].weight.data += 1
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_half_precision_base_keeps_its_dtype_and_trains_in_float32(path):
    layer = make(nn.Linear(6, 7).bfloat16(), 2)
    for factor in (layer.flora_A["default"], layer.flora_B["default"]):
        factor.weight.data = factor.weight.data.float()
    y = layer(torch.randn(4, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.flora_A["default"].weight.grad.dtype == torch.float32


def test_autocast_runs_the_base_product_in_its_dtype(path):
    layer = make(nn.Linear(6, 7), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(4, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.flora_B["default"].weight.grad.dtype == torch.float32


# torch 2.13's own tracing instantiates autograd functions and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_layer_equals_eager(path):
    layer = make(nn.Linear(6, 7), 2)
    x = torch.randn(4, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = layer(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)
    compiled(x).sum().backward()
    assert layer.flora_A["default"].weight.grad.abs().sum() > 0


def test_the_cheaper_path_is_chosen():
    assert not any(prefers_modulated(tokens, 1, "cpu", training) for tokens in (1, 10**6) for training in (False, True))
    assert not prefers_modulated(4, 8, "cpu", training=False)
    assert prefers_modulated(4096, 8, "cpu", training=False)
    assert prefers_modulated(4096, 4, "cpu", training=True)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (nn.Embedding(6, 7), "Embedding"),
        (nn.Conv2d(3, 4, 1), "Conv2d"),
        (nn.LayerNorm(6), "LayerNorm"),
        (nn.MultiheadAttention(8, 2).out_proj, "MultiheadAttention"),
    ],
)
def test_other_layers_are_refused_by_name(base, words):
    with pytest.raises(ConfigError, match=words):
        make(base, 1)
