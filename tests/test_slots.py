"""Cutting an adapter to a rank's part of a packed layer: what the ranks compute together equals the whole layer.

The oracle is the reference loop on the uncut weight; a rank runs the same loop on its part of the weight with the
terms that `layer_terms` gives it. Row-parallel partial outputs are summed, column-parallel ones concatenated.
"""

from dataclasses import replace

import pytest
import torch

from flora_vllm.adapter import ModuleTerms
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.slots import LinearLayout, SliceLayout, layer_terms, overflowed
from flora_vllm.terms import Added, Gain, Product

IN = 12
HEAD = 4
TOKENS = 5
# Factors stay float32 and the loop runs in float64: what differs is the rounding of one float32 product per factor
# (the folded scale), 6e-8 relative, over sums of at most 12 terms of order 10.
TOLERANCE = 1e-5


def _terms(out_features: int, rank: int, seed: int, *, bias_gain: bool = False, identity: bool = False) -> ModuleTerms:
    g = torch.Generator().manual_seed(seed)
    terms = (
        Product(torch.randn(rank, IN, generator=g), torch.randn(out_features, rank, generator=g), 1 / rank),
        Added(torch.randn(2, IN, generator=g), torch.randn(out_features, 2, generator=g), 0.5),
        Gain(torch.randn(out_features, generator=g), bias_gain),
    )
    return ModuleTerms((Product(), *terms) if identity else terms)


def _column_layout(name: str, children: dict[str, int], tp: int, rank: int, kv_replicas: int = 1) -> LinearLayout:
    """q and other parts are cut in `tp`; parts named k and v in tp / kv_replicas, as vLLM replicates kv heads."""
    slices, fused = [], 0
    for child, full in children.items():
        shares = tp // kv_replicas if child in ("k", "v") else tp
        share = rank // kv_replicas if child in ("k", "v") else rank
        size = full // shares
        slices.append(SliceLayout(child, size, share * size, fused + share * size, full))
        fused += full
    return LinearLayout(name, IN, 0, IN, tuple(slices), fused)


def _local_rows(layout: LinearLayout) -> torch.Tensor:
    return torch.cat([torch.arange(s.fused_start, s.fused_start + s.size) for s in layout.slices])


def _run(layout, modules, x_TI, weight_OI, bias_O):
    terms = layer_terms(layout, modules, torch.float32, bias_O)
    return reference_linear(x_TI, weight_OI, bias_O, layout.sizes, [None, terms], group_by_slot([1] * x_TI.shape[0]))


def _data(out_features: int):
    g = torch.Generator().manual_seed(7)
    return (
        torch.randn(TOKENS, IN, generator=g),
        torch.randn(out_features, IN, generator=g),
        torch.randn(out_features, generator=g),
    )


@pytest.mark.parametrize("bias_gain", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 2), (2, 2), (2, 1), (4, 2), (4, 1)])
def test_qkv_ranks_together_are_the_whole_layer(tp, kv_heads, rank, bias_gain):
    children = {"q": 4 * HEAD, "k": kv_heads * HEAD, "v": kv_heads * HEAD}
    modules = {name: _terms(size, rank, i, bias_gain=bias_gain) for i, (name, size) in enumerate(children.items())}
    x_TI, weight_OI, bias_O = _data(sum(children.values()))
    whole = _run(_column_layout("qkv", children, 1, 0), modules, x_TI, weight_OI, bias_O)
    replicas = max(1, tp // kv_heads)
    seen = torch.zeros(weight_OI.shape[0], dtype=torch.int64)
    for tp_rank in range(tp):
        layout = _column_layout("qkv", children, tp, tp_rank, replicas)
        rows = _local_rows(layout)
        seen[rows] += 1
        part = _run(layout, modules, x_TI, weight_OI[rows], bias_O[rows])
        torch.testing.assert_close(part, whole[:, rows], atol=TOLERANCE, rtol=0)
    assert seen.tolist() == [1] * children["q"] + [replicas] * (2 * children["k"])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_fused_checkpoint_module_is_cut_like_its_parts(tp):
    """Phi-3's `qkv_proj` and `gate_up_proj`: one module in the checkpoint, several slices in the engine."""
    children = {"gate": 8, "up": 8}
    fused = _terms(16, 3, 0)
    product, low, gain = fused.terms
    halves = {}
    for name, rows in (("gate", slice(0, 8)), ("up", slice(8, 16))):
        halves[name] = ModuleTerms(
            (
                replace(product, output=product.output[rows]),
                replace(low, up=low.up[rows]),
                replace(gain, gain=gain.gain[rows]),
            )
        )
    x_TI, weight_OI, bias_O = _data(16)
    for tp_rank in range(tp):
        layout = _column_layout("gate_up", children, tp, tp_rank)
        rows = _local_rows(layout)
        args = (x_TI, weight_OI[rows], bias_O[rows])
        torch.testing.assert_close(_run(layout, {"gate_up": fused}, *args), _run(layout, halves, *args), atol=0, rtol=0)


def test_slices_of_a_fused_module_share_one_copy_of_the_input_factor():
    layout = _column_layout("gate_up", {"gate": 8, "up": 8}, 1, 0)
    terms = layer_terms(layout, {"gate_up": _terms(16, 3, 0)}, torch.bfloat16)
    assert terms is not None
    gate, up = terms
    assert gate is not None
    assert up is not None
    assert gate.a_RI is up.a_RI
    assert gate.down_RI is up.down_RI


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_row_parallel_parts_sum_to_the_whole_layer(tp):
    """The input is cut; each rank applies the whole output side, and the all-reduce adds the parts."""
    out_features = 6
    modules = {"o": _terms(out_features, 5, 3)}
    x_TI, weight_OI, _ = _data(out_features)
    part = (SliceLayout("o", out_features, 0, 0, out_features),)
    whole = _run(LinearLayout("o", IN, 0, IN, part, out_features), modules, x_TI, weight_OI, None)
    width = IN // tp
    total = torch.zeros_like(whole)
    for tp_rank in range(tp):
        columns = slice(tp_rank * width, (tp_rank + 1) * width)
        layout = LinearLayout("o", width, columns.start, IN, part, out_features)
        total += _run(layout, modules, x_TI[:, columns], weight_OI[:, columns], None)
    torch.testing.assert_close(total, whole, atol=TOLERANCE, rtol=0)


def test_a_part_left_alone_stays_none_and_a_layer_left_alone_is_none():
    layout = _column_layout("qkv", {"q": 8, "k": 4, "v": 4}, 2, 1)
    terms = layer_terms(layout, {"k": _terms(4, 2, 0)}, torch.float32)
    assert terms is not None
    assert [part is None for part in terms] == [True, False, True]
    assert layer_terms(layout, {"other": _terms(4, 2, 0)}, torch.float32) is None


def test_what_a_slot_gets_is_contiguous_typed_and_has_its_scale_folded():
    layout = _column_layout("qkv", {"q": 8, "k": 4, "v": 4}, 2, 1)
    whole = _terms(8, 4, 0, identity=True, bias_gain=True)
    terms = layer_terms(layout, {"q": whole}, torch.bfloat16, torch.full((8,), 2.0))
    assert terms is not None
    part = terms[0]
    assert part is not None
    assert all(t.is_contiguous() for t in part.tensors())
    assert all(t.dtype == torch.bfloat16 for t in (part.a_RI, part.b_RO, part.down_RI, part.up_RO))
    assert part.plain_O.dtype == part.offset_O.dtype == torch.float32
    assert part.products == 5
    _, product, _, gain = whole.terms
    assert torch.equal(part.plain_O, gain.gain[4:8])
    assert torch.equal(part.b_RO, (gain.gain[4:8, None] * (product.output[4:8] / 4)).bfloat16().T)
    assert torch.equal(part.offset_O, (gain.gain[4:8] - 1) * 2)


def test_a_missing_output_factor_becomes_the_scale():
    """IA3 on the input: its checkpoint has no output side."""
    layout = _column_layout("down", {"down": 8}, 2, 1)
    terms = layer_terms(layout, {"down": ModuleTerms((Product(torch.ones(1, IN), None, 3.0),))}, torch.float32)
    assert terms is not None
    part = terms[0]
    assert part is not None
    assert part.b_RO is not None
    assert torch.equal(part.b_RO, torch.full((1, 4), 3.0))


def test_values_beyond_the_dtype_are_seen():
    layout = _column_layout("down", {"down": 8}, 1, 0)
    large = ModuleTerms((Product(torch.full((1, IN), 1e5), torch.ones(8, 1)),))
    for dtype, expected in ((torch.float16, True), (torch.float32, False), (torch.bfloat16, False)):
        terms = layer_terms(layout, {"down": large}, dtype)
        assert terms is not None
        assert overflowed(terms) is expected


def test_shapes_name_the_parts_and_the_fused_module():
    layout = _column_layout("qkv", {"q": 8, "k": 4, "v": 4}, 2, 0)
    assert layout.shapes() == {"qkv": (16, IN), "q": (8, IN), "k": (4, IN), "v": (4, IN)}
