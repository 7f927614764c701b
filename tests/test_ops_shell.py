"""Rare terms around the kernels: any mix of hot and rare slots is the equation, through one call of the base."""

from dataclasses import replace

import pytest
import torch
from ops_support import DTYPES, SIZES, Case, assert_close

from flora_vllm.ops.rare import DenseAdded, RareTerm, SharedLow, Swapped, Turned
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.table import LinearKernel
from flora_vllm.ops.terms import SliceTerms, group_by_slot

IN = 24
IMPLEMENTATIONS = ("torch", "opaque", "native")
# A bfloat16 row is rounded once more where it is turned, and y where the kernel leaves off.
MORE_ROUNDINGS = 3


class Layer(Case):
    """A packed layer with slots of every rare kind and every mix; swaps need even slices."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__(dtype, IN, tuple(size + size % 2 for size in SIZES), seed)
        self.down_LI = self.tensor(5, IN)
        self.up_OL = [self.tensor(size, 5) for size in self.sizes]

    def turn(self, *, ordered: bool = False) -> Turned:
        order_I = torch.randperm(IN, generator=self.random) if ordered else None
        return Turned(torch.randn(4, 6, 6, generator=self.random) / 6**0.5, order_I)

    def swap(self, i: int) -> Swapped:
        return Swapped(self.vector(self.sizes[i]), self.vector(self.sizes[i]), 2)

    def shared(self, i: int, *, square: bool = False) -> SharedLow:
        mid = torch.randn(5, 5, generator=self.random) if square else self.vector(5)
        return SharedLow(self.down_LI, self.up_OL[i], mid, self.vector(self.sizes[i]))

    def with_rare(self, i: int, *rare: RareTerm, **hot) -> SliceTerms:
        return replace(self.terms(self.sizes[i], **({"plain": "one"} | hot)), rare=rare)

    def add_rare_slots(self) -> "Layer":
        three, turn = range(len(self.sizes)), self.turn(ordered=True)
        chain = (self.turn(), self.turn(ordered=True))
        self.slots += [
            tuple(self.with_rare(i, replace(turn)) for i in three),  # the slices agree: the same tensors
            tuple(self.with_rare(i, self.turn(), plain="each") for i in three),
            (self.with_rare(0, *chain), None, self.with_rare(2, *chain, rank=2, plain=None)),
            tuple(self.with_rare(i, self.swap(i), offset=True) for i in three),
            tuple(self.with_rare(i, self.shared(i)) for i in three),
            tuple(self.with_rare(i, self.shared(i, square=True), rank=2, low=1) for i in three),
            (self.with_rare(0, DenseAdded(self.tensor(self.sizes[0], IN)), plain=None), None, None),
            # All at once, with a low-rank term that reads the row as it was.
            tuple(
                self.with_rare(
                    i, self.turn(), self.shared(i), DenseAdded(self.tensor(size, IN)), self.swap(i), rank=2, low=2
                )
                for i, size in enumerate(self.sizes)
            ),
        ]
        return self

    def shell(self, implementation: str, path="auto", hidden_bias: torch.Tensor | None = None, device=None):
        """The shell with every slot written, around a kernel that was made without any."""
        slots, self.slots = self.slots, [None]
        kernel = self.make(implementation, path)
        self.slots = slots
        shell = Shell(kernel, self.sizes, hidden_bias, device)
        for slot, terms in enumerate(self.slots[1:], 1):
            shell.write_slot(slot, terms)
        return shell, kernel

    def tolerance(self, implementation: str, x_TI: torch.Tensor, truth_TO: torch.Tensor) -> torch.Tensor:
        """Of sums and products of some 24 x 5 numbers of order 1: roundings relative to each row's largest output."""
        unit = 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-24 * 64
        return (3 + MORE_ROUNDINGS) * unit * truth_TO.abs().amax(1, keepdim=True).expand_as(truth_TO) + 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mix_of_hot_and_rare_slots_is_the_equation(dtype, implementation):
    layer = Layer(dtype).add_rare_slots()
    layer.add_slots(3, 4)
    slots = len(layer.slots)
    for path in ("auto", "stacked") if implementation == "opaque" else ("auto", "stacked", "modulated"):
        shell, _ = layer.shell(implementation, path)
        scattered = torch.arange(3 * slots) % slots, torch.randint(0, slots, (40,), generator=layer.random)
        # Each slot's rows are neighbours: of all slots in a row, and with the base's between them.
        ordered = torch.arange(slots).repeat_interleave(2)
        for slot_T in (*scattered, ordered, ordered.flip(0) * (torch.arange(2 * slots) % 4 < 2)):
            x_TI, segments = layer.tensor(len(slot_T), IN), group_by_slot(slot_T)
            truth = layer.reference(x_TI, segments)
            before = x_TI.clone()
            y_TO = shell.forward(x_TI, layer.bias_O, segments)
            assert y_TO.dtype == dtype
            assert torch.equal(x_TI, before)
            assert_close(y_TO, truth, layer.tolerance(implementation, x_TI, truth))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_rare_slot_alone_is_the_equation(implementation):
    layer = Layer(torch.float32, seed=1).add_rare_slots()
    shell, _ = layer.shell(implementation)
    for slot in range(1, len(layer.slots)):
        x_TI, segments = layer.tensor(5, IN), group_by_slot([slot] * 5)
        truth = layer.reference(x_TI, segments)
        assert_close(shell.forward(x_TI, layer.bias_O, segments), truth, layer.tolerance(implementation, x_TI, truth))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_terms_act_on_a_bias_that_the_caller_adds(implementation):
    layer = Layer(torch.float32, seed=2).add_rare_slots()
    shell, _ = layer.shell(implementation, hidden_bias=layer.bias_O)
    slot_T = torch.arange(2 * len(layer.slots)) % len(layer.slots)
    x_TI, segments = layer.tensor(len(slot_T), IN), group_by_slot(slot_T)
    truth = layer.reference(x_TI, segments)
    y_TO = shell.forward(x_TI, None, segments) + layer.bias_O
    assert_close(y_TO, truth, layer.tolerance(implementation, x_TI, truth))


def _counted(kernel: LinearKernel) -> list[int]:
    """Rows of each call of the kernel's base from now on."""
    calls, base = [], kernel.base

    def counted(x_TI: torch.Tensor) -> torch.Tensor:
        calls.append(len(x_TI))
        return base(x_TI)

    kernel.base = counted
    return calls


def test_the_base_is_called_once_for_turned_and_other_rows():
    layer = Layer(torch.float32).add_rare_slots()
    shell, kernel = layer.shell("opaque")
    calls = _counted(kernel)
    # Three slices that agree: the row itself is turned. That differ: three rows. One left alone: a row of x as well.
    for slot_T, rows in (([1] * 10, 10), ([2] * 10, 30), ([5] * 10, 10), ([0, 1, 2, 4, 5], 1 + 1 + 3 + 1 + 1)):
        segments = group_by_slot(slot_T)
        shell.forward(layer.tensor(len(slot_T), IN), layer.bias_O, segments)
        assert calls == [rows]
        calls.clear()


def test_shared_factors_are_multiplied_once_for_all_segments(monkeypatch):
    layer = Layer(torch.float32)
    for _ in range(4):
        layer.slots.append(tuple(layer.with_rare(i, layer.shared(i)) for i in range(len(layer.sizes))))
    shell, _ = layer.shell("native")
    monkeypatch.setattr(SharedLow, "apply", lambda *_: pytest.fail("a term by itself"))
    products = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(len(a)) or matmul(a, b))
    shell.forward(layer.tensor(10, IN), layer.bias_O, group_by_slot([1, 2, 3, 4, 4, 0, 2, 1, 3, 4]))
    assert products == [9, 9] * len(layer.sizes)


def test_a_rewritten_slot_forgets_its_rare_terms():
    layer = Layer(torch.float32).add_rare_slots()
    shell, _ = layer.shell("native")
    assert shell.rare_slots == set(range(1, 9))
    x_TI, segments = layer.tensor(3, IN), group_by_slot([4, 4, 0])
    for slot in range(1, 9):
        shell.write_slot(slot, None)
    assert not shell.rare_slots
    layer.slots[4] = None
    truth = layer.reference(x_TI, segments)
    assert_close(shell.forward(x_TI, layer.bias_O, segments), truth, layer.tolerance("native", x_TI, truth))


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_rows_are_the_torch_form_and_do_not_depend_on_the_step(dtype, monkeypatch):
    """RoAd's and VeRA's rows, wider than a register and odd: the library against torch, alone and in a mix."""
    layer = Layer(dtype, seed=4)
    layer.sizes = (70, 4, 44)
    layer.weight_OI, layer.bias_O = layer.tensor(118, IN), layer.tensor(118)
    layer.up_OL = [layer.tensor(size, 5) for size in layer.sizes]

    def swapped(i: int, group: int) -> Swapped:
        return Swapped(layer.vector(layer.sizes[i]), layer.vector(layer.sizes[i]), group)

    layer.slots += [
        tuple(layer.with_rare(i, swapped(i, size)) for i, size in enumerate(layer.sizes)),
        tuple(layer.with_rare(i, swapped(i, 2)) for i in range(3)),
        tuple(layer.with_rare(i, layer.shared(i)) for i in range(3)),
        (layer.with_rare(0, SharedLow(layer.down_LI, layer.up_OL[0])), None, layer.with_rare(2, swapped(2, 44))),
        tuple(layer.with_rare(i, layer.shared(i), swapped(i, 2)) for i in range(3)),  # two terms: torch's
    ]
    x_TI, slot_T = layer.tensor(100, IN), torch.cat([torch.arange(30) % 6, torch.full((70,), 1)])
    segments = group_by_slot(slot_T)
    monkeypatch.setenv("FLORA_NATIVE", "0")
    torch_shell, _ = layer.shell("native", "stacked")
    monkeypatch.setenv("FLORA_NATIVE", "1")
    shell, _ = layer.shell("native", "stacked", device=torch.device("cpu"))  # as an engine says it
    with monkeypatch.context() as patch:
        patch.setattr(SharedLow, "apply", lambda *_: pytest.fail("a term in torch"))
        y_TO = shell.forward(x_TI, layer.bias_O, segments)
    truth = layer.reference(x_TI, segments)
    assert_close(y_TO, truth, layer.tolerance("native", x_TI, truth))
    # Rounded at the same places: ulps where sums in float32 differ.
    torch.testing.assert_close(y_TO, torch_shell.forward(x_TI, layer.bias_O, segments), rtol=2**-6, atol=1e-3)
    for token in (1, 2, 25, 99):
        alone = shell.forward(x_TI[token : token + 1], layer.bias_O, group_by_slot([int(slot_T[token])]))
        assert torch.equal(alone[0], y_TO[token])
