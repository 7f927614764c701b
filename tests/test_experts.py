"""Experts computed one by one against vLLM's fused CPU kernel, and the adapted ones against merged weights."""

from dataclasses import replace

import engine_support as support
import pytest
import torch
from device_stand_in import Device, OnDevice, on_host
from experts_support import CPU, HIDDEN, INNER, Layer, low_rank, noise, some_tokens

from flora_vllm.experts import ACTIVATIONS
from flora_vllm.ops import shell
from flora_vllm.ops.dispatch import NEVER
from flora_vllm.ops.rare import Swapped
from flora_vllm.ops.terms import SliceTerms, group_by_slot
from flora_vllm.step import GraphSteps, Step

# vLLM and what it imports warn: it is imported where the marks hold.
pytestmark = support.ENGINE_MARKS


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_by_one_is_the_fused_kernel(activation, has_bias, is_packed):
    """From the weights as the CPU kernel packs them, and in the checkpoint's order, as the Triton kernel has them."""
    layer, step = Layer(activation, has_bias=has_bias), Step()
    adapted, experts = layer.adapted(step, is_packed=is_packed)
    experts[0].down.write_slot(1, (low_rank(HIDDEN, layer.inner, seed=9, scale=0.0)[0],))  # no change
    tokens = some_tokens(50)
    step.set_mapping([1] * 50, {1: 1})
    torch.testing.assert_close(adapted.forward(*tokens), layer.fused(*tokens), rtol=1e-4, atol=1e-5)


def test_adapted_rows_are_those_of_merged_weights_and_others_the_kernels_own():
    layer, step = Layer("silu"), Step()
    adapted, experts = layer.adapted(step)
    gate, up, down = layer.gate.clone(), layer.up.clone(), layer.down.clone()
    for i in (0, 2):  # two of the four experts, one only in part
        terms, delta = low_rank(INNER, HIDDEN, seed=10 * i)
        experts[i].gate_up.write_slot(2, (terms, None))
        gate[i] += delta
    terms, delta = low_rank(HIDDEN, INNER, seed=50)
    experts[0].down.write_slot(2, (terms,))
    down[0] += delta
    tokens = some_tokens(12)
    merged, stock = layer.fused(*tokens, layer.packed_with(gate, up, down)), layer.fused(*tokens)
    assert (merged - stock).abs().max() > 0.1
    ids = [0, 7, 5] * 4  # adapter 7 has terms in other layers only
    step.set_mapping(ids, {5: 2, 7: 1})
    served = adapted.forward(*tokens)
    for row, adapter in enumerate(ids):
        wanted = merged if adapter == 5 else stock
        torch.testing.assert_close(served[row], wanted[row], rtol=1e-4, atol=1e-5)
    # Alone, and once the slot is empty again.
    step.set_mapping([5], {5: 2})
    alone = adapted.forward(*(t[2:3] for t in tokens))
    torch.testing.assert_close(alone[0], served[2], rtol=1e-5, atol=1e-6)
    for expert in experts:
        expert.gate_up.write_slot(2, None)
        expert.down.write_slot(2, None)
    assert torch.equal(adapted.forward(*(t[2:3] for t in tokens)), layer.fused(*(t[2:3] for t in tokens)))


def test_a_write_that_fails_halfway_is_cleared_like_any(monkeypatch):
    """There is no memory for the rare term; the low-rank one is in the slot by then."""
    layer, step = Layer("silu"), Step()
    adapted, experts = layer.adapted(step)
    linear = experts[0].down
    swapped = Swapped(noise(HIDDEN, seed=1), noise(HIDDEN, seed=2), 2)
    terms = (replace(low_rank(HIDDEN, INNER, seed=50)[0], rare=(swapped,)),)
    tokens = some_tokens(12)
    step.set_mapping([1] * 12, {1: 1})

    def no_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(shell, "placed", no_memory)
        with pytest.raises(MemoryError):
            linear.write_slot(1, terms)
    linear.write_slot(1, None)
    assert torch.equal(adapted.forward(*tokens), layer.fused(*tokens)), "nobody uses the slot"
    x, segments = noise(4, INNER, seed=3), group_by_slot([1] * 4)
    assert torch.equal(linear.forward(x, segments), linear.forward(x, group_by_slot([0] * 4)))
    # And the slot counts once, whatever failed before.
    linear.write_slot(1, terms)
    assert not torch.equal(adapted.forward(*tokens), layer.fused(*tokens))
    linear.write_slot(1, None)
    assert torch.equal(adapted.forward(*tokens), layer.fused(*tokens))


@pytest.mark.parametrize("has_bias", [False, True])
def test_nothing_mixes_the_host_with_the_device(has_bias):
    """No GPU has run this: its tensors are stood in for, with terms of every sort that an expert's layer can have."""
    layer, ids = Layer("silu", has_bias=has_bias), [1, 0, 2] * 4
    products = SliceTerms(a_RI=noise(2, HIDDEN, seed=30), b_RO=noise(2, INNER, seed=31))
    swapped = Swapped(noise(HIDDEN, seed=32), noise(HIDDEN, seed=33), 2)
    answers = []
    for on_device in (False, True):
        step = Step()
        adapted, experts = layer.adapted(step, on_device=on_device)
        tokens = some_tokens(12)
        with Device():
            experts[0].gate_up.write_slot(1, (low_rank(INNER, HIDDEN, seed=20)[0], None))
            experts[1].gate_up.write_slot(2, (None, products))
            experts[2].down.write_slot(2, (SliceTerms(torch.ones(1), rare=(swapped,)),))
            step.set_mapping(ids, {1: 1, 2: 2})
            if on_device:
                answers.append(on_host(adapted.forward(*map(OnDevice, tokens))))
                assert adapted.error(*map(OnDevice, tokens)) < 1e-4
            else:
                answers.append(adapted.forward(*tokens))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


def test_a_weight_on_the_input_is_used_once():
    layer, step = Layer("silu"), Step()
    adapted, experts = layer.adapted(step, weighs_input=True)
    experts[1].down.write_slot(1, (low_rank(HIDDEN, INNER, seed=9, scale=0.0)[0],))
    x, weights, chosen = (t[:, :1] if i else t for i, t in enumerate(some_tokens(6)))
    step.set_mapping([1] * 6, {1: 1})
    wanted = layer.fused(x * weights, torch.ones_like(weights), chosen)
    torch.testing.assert_close(adapted.forward(x, weights, chosen), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_packed_weights(dtype):
    from vllm._custom_ops import cpu_prepack_moe_weight

    from flora_vllm.plugin.expert_weights import packing, product, unpacked

    weight = noise(96, HIDDEN, seed=1).to(dtype)
    tile = packing("vec", dtype)
    assert tile is not None
    packed = cpu_prepack_moe_weight(weight[None], "vec")[0]
    assert torch.equal(unpacked(packed, tile), weight)
    assert not torch.equal(packed, weight)
    for rows in (1, 100):
        x = noise(rows, HIDDEN, seed=2).to(dtype)
        torch.testing.assert_close(product(x, packed, tile), x @ weight.T)
    # More than what a sum in a half type could count to.
    ones = cpu_prepack_moe_weight(torch.ones(1, 32, 4096, dtype=dtype), "vec")[0]
    assert (product(torch.ones(1, 4096, dtype=dtype), ones, tile) == 4096).all()


def test_the_op_is_opaque_and_finds_its_layer():
    layer, step = Layer("silu"), Step()
    adapted, _ = layer.adapted(step)
    tokens = some_tokens(3)
    assert torch.equal(torch.ops.flora.experts(*tokens, adapted.handle), layer.fused(*tokens))
    traced = torch.compile(
        lambda *given: torch.ops.flora.experts(*given, adapted.handle), backend="eager", fullgraph=True
    )
    assert torch.equal(traced(*tokens), layer.fused(*tokens))


def test_a_graph_holds_the_base_call_and_no_step_with_terms_of_experts():
    layer, step = Layer("silu"), Step()
    adapted, experts = layer.adapted(step)
    terms = (low_rank(HIDDEN, INNER, seed=9)[0],)
    experts[0].down.write_slot(1, terms)
    assert experts[0].down.why_not_captured() is None
    assert experts[0].down.graph_rows(terms) == NEVER
    step.graphs = GraphSteps(8, 8, 1, CPU)
    tokens = some_tokens(6)
    step.set_mapping([1] * 6, {1: 1})
    assert not torch.equal(adapted.forward(*tokens), layer.fused(*tokens))
    step.rehearse(6)
    assert torch.equal(adapted.forward(*tokens), layer.fused(*tokens))
