"""Every kind of term, folded for a rank and run, does what it does merged: whole, and cut in two either way."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.terms import SliceTerms, group_by_slot
from flora_vllm.ops.torch_linear import TorchLinear
from flora_vllm.terms import (
    Added,
    Bases,
    Circulant,
    Cut,
    Dense,
    Gain,
    Kron,
    Offset,
    Product,
    Replaced,
    Shared,
    Sparse,
    Swap,
    Term,
    Turn,
    fold,
    merged,
)
from flora_vllm.terms.from_base import FromBase

torch.set_num_threads(1)

# No two sides alike, and cuts that fall inside the blocks of a Kronecker product and of a circulant matrix.
O, I = 48, 32  # noqa: E741 - the shape letters
ROWS, COLUMNS = (0, 20, O), (0, 12, I)
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0, std: float = 0.5) -> torch.Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def shared(key: str, *shape: int) -> Shared:
    return Shared(f"{key} {shape}", (shape[0], shape[1]), lambda: normal(*shape, seed=len(key)))


def orthogonal(number: int, size: int) -> torch.Tensor:
    skew = normal(number, size, size)
    return torch.linalg.matrix_exp(skew - skew.transpose(1, 2))


KINDS: dict[str, Term] = {
    "plain": Product(scale=0.7),
    "product": Product(normal(3, I), normal(O, 3), 0.5),
    "product-in": Product(normal(1, I)),
    "product-out": Product(output=normal(O, 1)),
    "added": Added(normal(4, I), normal(O, 4), 0.5),
    "added-mid": Added(normal(4, I), normal(O, 4), 2.0, mid=normal(4), out=normal(O)),
    "added-core": Added(normal(4, I), normal(O, 3), mid=normal(3, 4)),
    "shared": Added(shared("a", 6, 40), shared("b", 50, 6), 2.0, mid=normal(6), out=normal(O)),
    "shared-core": Added(shared("a", 6, 40), shared("b", 50, 6), mid=normal(6, 6)),
    "shared-alone": Added(shared("a", 6, 40), shared("b", 50, 6), 0.5),
    "bases-in": Bases(shared("s", 5, 36), shared("l", 60, 35), normal(5, 7), normal(7, I), meets_input=True, scale=0.5),
    "kron": Kron(normal(6, 4), normal(8, 8), scale=0.5),
    "kron-low": Kron(normal(3, 8), normal(16, 2), normal(2, 4), 0.5),
    "circulant": Circulant(normal(3, 2, 16), 0.5),
    "sparse": Sparse(normal(40), torch.arange(40) * 7 % O, torch.arange(40) * 5 % I, (O, I), 0.5),
    "sparse-twice": Sparse(normal(4), torch.tensor([3, 3, 3, 47]), torch.tensor([2, 2, 31, 0]), (O, I)),
    "dense": Dense(normal(O, I), 0.5),
    "replaced": Replaced(normal(O, I)),
    "replaced-rows": Replaced(normal(3, I), torch.tensor([47, 3, 19])),
    "turn": Turn(orthogonal(8, 4)),
    "turn-order": Turn(orthogonal(8, 4), torch.randperm(I, generator=torch.Generator().manual_seed(1))),
    "gain": Gain(normal(O, std=1.0), scales_bias=False),
    "gain-bias": Gain(normal(O, std=1.0), scales_bias=True),
    "offset": Offset(normal(O), 0.5),
    "offset-replaces": Offset(normal(O), replaces=True),
    "swap": Swap(normal(O), normal(O), 4),
}


def parts(cut: str) -> list[tuple[slice, slice]]:
    """Rows and columns of each rank."""
    if cut == "whole":
        return [(slice(0, O), slice(0, I))]
    if cut == "rows":
        return [(slice(a, b), slice(0, I)) for a, b in itertools.pairwise(ROWS)]
    return [(slice(0, O), slice(a, b)) for a, b in itertools.pairwise(COLUMNS)]


def folded(terms: Sequence[Term], bias_O: torch.Tensor | None, cut: str) -> list[SliceTerms]:
    found = []
    for rank, (rows, columns) in enumerate(parts(cut)):
        sums = cut == "columns"
        part = None if bias_O is None else bias_O[rows]
        adds_bias = not sums or rank == 0
        found.append(fold(terms, Cut(rows, columns, torch.float32, CPU, part, adds_bias, sums)))
    return found


def worst(terms: Sequence[Term], cut: str, biased: bool = True) -> float:
    """Error of the folded terms, by the reference and by torch with the shell, against the merged weight and bias."""
    weight_OI, x_TI = normal(O, I, seed=3).double(), normal(5, I, seed=4)
    bias_O = normal(O, seed=5, std=1.0) if biased else None
    new_OI, new_O = merged(weight_OI, None if bias_O is None else bias_O.double(), terms)
    wanted = x_TI.double() @ new_OI.T + (0 if new_O is None else new_O)
    segments = group_by_slot([1] * 5)
    by_rank: list[list[torch.Tensor]] = [[], []]
    for rank, ((rows, columns), contents) in enumerate(zip(parts(cut), folded(terms, bias_O, cut), strict=True)):
        weight, x = weight_OI[rows, columns].float(), x_TI[:, columns].contiguous()
        sizes = (weight.shape[0],)
        bias = None if bias_O is None or (cut == "columns" and rank) else bias_O[rows]
        by_rank[0].append(reference_linear(x, weight, bias, sizes, [None, (contents,)], segments))
        shell = Shell(TorchLinear(weight, lambda x, w=weight: x @ w.T, sizes, DispatchRule("auto"), x.shape[1]), sizes)
        shell.write_slot(1, (contents,))
        by_rank[1].append(shell.forward(x, bias, segments).double())
    together = [sum(ranks) if cut == "columns" else torch.cat(ranks, 1) for ranks in by_rank]
    return max(float((found - wanted).abs().max()) for found in together)


@pytest.mark.parametrize("cut", ["whole", "rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_folded_is_the_kind_merged(kind: str, cut: str) -> None:
    if cut == "columns" and kind in ("swap", "turn-order"):
        with pytest.raises(AdapterError, match="serve it with"):
            folded([KINDS[kind]], None, cut)
        return
    for biased in (True, False):
        assert worst([KINDS[kind]], cut, biased) < 2e-5


@pytest.mark.parametrize("cut", ["whole", "rows", "columns"])
def test_random_mixes_of_kinds(cut: str) -> None:
    choose = random.Random(7)
    names = [name for name in KINDS if cut != "columns" or name not in ("swap", "turn-order")]
    for _ in range(40):
        mix = choose.sample(names, choose.randint(2, 5))
        if {"replaced", "replaced-rows"} <= {*mix}:  # a weight is replaced once
            mix.remove("replaced")
        error = worst([KINDS[name] for name in mix], cut, choose.random() < 0.7)
        assert error < 1e-4, mix


def test_a_layer_whose_output_is_its_smaller_side() -> None:
    term = Bases(shared("s", 5, 36), shared("l", 60, 35), normal(5, 7), normal(7, 24), meets_input=False, scale=0.5)
    weight_OI, x_TI = normal(24, 52), normal(4, 52)
    wanted = x_TI @ merged(weight_OI, None, [term])[0].T
    cuts = [(slice(0, 24), slice(0, 52)), (slice(0, 10), slice(0, 52)), (slice(10, 24), slice(0, 52))]
    for rows, columns in [*cuts, (slice(0, 24), slice(0, 20)), (slice(0, 24), slice(20, 52))]:
        contents = fold([term], Cut(rows, columns, torch.float32, CPU))
        found = x_TI[:, columns] @ weight_OI[rows, columns].T + contents.rare[0].apply(x_TI[:, columns])
        part = x_TI[:, columns] @ merged(weight_OI, None, [term])[0][rows, columns].T
        assert torch.allclose(found, part, atol=1e-4)
    assert wanted.shape == (4, 24)


def test_bases_are_chunked_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from flora_vllm.ops.rare import BasesAdded

    (added,) = folded([KINDS["bases-in"]], None, "whole")[0].rare
    x_TI = normal(9, I)
    whole = added.apply(x_TI)
    monkeypatch.setattr(BasesAdded, "chunk", 2 * 5 * I)
    assert torch.allclose(added.apply(x_TI), whole, atol=1e-6)


def test_shared_factors_are_held_once_whatever_asks_for_them() -> None:
    from flora_vllm.terms.shared import held_bytes

    before = held_bytes()
    terms = [Added(shared("once", 8, 64), shared("twice", 64, 8), mid=normal(8), out=normal(O)) for _ in range(50)]
    contents = [fold([term], Cut(slice(0, O), slice(0, I), torch.float32, CPU)) for term in terms]
    contents += [fold([term], Cut(slice(0, 20), slice(0, 12), torch.float32, CPU)) for term in terms[:1]]
    del terms
    assert held_bytes() - before == 2 * 8 * 64 * 4
    own = sum(tensor.numel() for part in contents for tensor in part.tensors())
    assert own == 50 * (1 + 8 + O) + (1 + 8 + 20), "the plain weight, mid and out"
    del contents
    assert held_bytes() == before


def test_a_shared_factor_that_leaves_the_range_of_the_dtype_is_refused() -> None:
    """Every time it is asked for: what was refused is not held."""
    large = Shared("large", (64, 64), lambda: torch.full((64, 64), 7e4))
    added = Added(large, shared("fine", 64, 64), mid=normal(64))
    bases = Bases(shared("fine", 5, 64), large, normal(5, 7), normal(7, I), meets_input=True)
    for term in (added, bases):
        for _ in range(2):
            with pytest.raises(AdapterError, match=r"leave the range of torch\.float16, the model's dtype; serve"):
                fold([term], Cut(slice(0, O), slice(0, I), torch.float16, CPU))
        fold([term], Cut(slice(0, O), slice(0, I), torch.bfloat16, CPU))


def test_terms_that_wait_for_the_base_are_never_folded() -> None:
    with pytest.raises(AssertionError, match="resolved before"):
        folded([FromBase(lambda _probe: (), ())], None, "whole")
