"""Every kind of term around the kernels, rare ones too; test_triton_linear.py runs this in a process of its own.

Experts, feed-forward blocks and embeddings are not here: they have torch forms of their own on every device (`experts`,
`feed_forward`, `embedding`).
"""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

import dataclasses
import inspect

import pytest
import torch
from ops_support import assert_close
from test_ops_shell import IN, Layer
from triton_support import CPU, fresh_memory_is_nan, name_of, record_launches

from flora_vllm.ops import rare as rare_terms
from flora_vllm.ops import table
from flora_vllm.ops.dispatch import DispatchRule, PathChoice
from flora_vllm.ops.rare import BasesAdded, CirculantAdded, GatedAdded, KronAdded, RowsAdded, SparseAdded
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.terms import SliceTerms, SlotLimits, group_by_slot

__all__ = ["fresh_memory_is_nan"]


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    """Slots of every hot kind, of every rare one, and of both."""
    monkeypatch.setenv("FLORA_NATIVE", "0")
    layer = Layer(torch.float32).add_rare_slots()
    layer.add_slots(3, 4)

    def added(i: int) -> tuple:
        size, random = layer.sizes[i], layer.random
        indices = [torch.randint(0, n, (9,), generator=random).int() for n in (size, IN)]
        blocks = -(-size // 8)
        return (
            GatedAdded(layer.tensor(3, IN), layer.tensor(6, IN), layer.tensor(size, 6), 2, 1.5, is_absolute=False),
            BasesAdded(
                layer.tensor(2, IN), layer.tensor(size, 6), layer.tensor(2, 3), layer.tensor(3, IN), meets_input=True
            ),
            KronAdded(layer.tensor(blocks, 4), layer.tensor(8, 6), None, 0, 0, size),
            CirculantAdded(layer.tensor(blocks, 3, 8), 0, 0, size),
            SparseAdded(layer.tensor(9), *indices, size),
            RowsAdded(layer.tensor(3, IN), torch.tensor([4, 0, 2]), size),
        )

    kinds = [added(i) for i in range(len(layer.sizes))]
    for kind in range(len(kinds[0])):
        layer.slots.append(tuple(layer.with_rare(i, terms[kind], rank=kind % 3) for i, terms in enumerate(kinds)))
    return layer


def shell_of(layer: Layer, path: PathChoice, *, is_opaque: bool = False) -> Shell:
    limits = SlotLimits(slots=len(layer.slots) - 1, rank=4, low_rank=4)
    weight_OI = None if is_opaque else layer.weight_OI
    kernel = table.make_linear(weight_OI, layer.base, layer.sizes, DispatchRule(path), IN, CPU, limits)
    assert kernel.implementation == "triton"
    shell = Shell(kernel, layer.sizes)
    for slot, terms in enumerate(layer.slots[1:], 1):
        shell.write_slot(slot, terms)
    return shell


def test_no_kind_is_missing(layer: Layer) -> None:
    parts = [part for terms in layer.slots if terms for part in terms if part]
    for field in dataclasses.fields(SliceTerms):
        assert any(getattr(part, field.name) not in (None, ()) for part in parts), field.name
    kinds = {kind for _, kind in inspect.getmembers(rare_terms, dataclasses.is_dataclass) if kind.stage != "block"}
    assert {type(term) for part in parts for term in part.rare} == kinds


@pytest.mark.parametrize(
    ("path", "is_opaque"), [("auto", False), ("stacked", False), ("modulated", False), ("auto", True)]
)
def test_every_kind_of_term_in_one_step(layer: Layer, path: PathChoice, is_opaque: bool) -> None:
    shell = shell_of(layer, path, is_opaque=is_opaque)
    slot_T = torch.arange(3 * len(layer.slots)) * 7 % len(layer.slots)
    x_TI, segments = layer.tensor(len(slot_T), IN), group_by_slot(slot_T)
    truth = layer.reference(x_TI, segments)
    assert_close(shell.forward(x_TI, layer.bias_O, segments), truth, layer.tolerance("triton", x_TI, truth))


def test_rare_terms_beside_plain_rows_take_no_launch(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = shell_of(layer, "stacked")
    launches = record_launches(monkeypatch)
    expected = {
        (0, 1, 4): ["flora_stacked"],  # turned; turned pairs with an offset
        (0, 5): [],  # over shared factors
        (0, 13): [],  # gated
        (6, 0): ["flora_stacked", "flora_low_up"],
        tuple(range(len(layer.slots))): ["flora_stacked", "flora_low_up"],
    }
    for slot_T, names in expected.items():
        launches.clear()
        shell.forward(layer.tensor(len(slot_T), IN), layer.bias_O, group_by_slot(slot_T))
        assert [name_of(launch) for launch in launches] == names, slot_T
