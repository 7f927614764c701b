"""The adapted embedding alone: whose rows change, by how much, and through the op as compiled code calls it."""

import pytest
import torch

from flora_vllm.embedding import AdaptedEmbedding, embedding
from flora_vllm.errors import StepError
from flora_vllm.ops.rare import RowsAdded
from flora_vllm.ops.terms import SliceTerms
from flora_vllm.step import Step

VOCABULARY, WIDTH = 11, 6
IDS = torch.tensor([3, 10, 0, 3, 7, 7, 1])
ADAPTERS = (5, 5, 0, 0, 8, 8, 5)  # of the tokens; 8 leaves the embedding alone


def terms(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> SliceTerms:
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, WIDTH, generator=g), torch.randn(rank, VOCABULARY, generator=g)
    return SliceTerms(torch.ones(1), down_RI=down.to(dtype), up_RO=up.to(dtype))


def made(step: Step, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, AdaptedEmbedding]:
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    functional = torch.nn.functional
    return weight, AdaptedEmbedding(
        lambda ids: functional.embedding(ids, weight), lambda x: functional.linear(x, weight), step, torch.device("cpu")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_row_is_its_own_adapters(dtype: torch.dtype) -> None:
    step = Step()
    weight, layer = made(step, dtype)
    first, second = terms(2, 1, dtype), terms(3, 2, dtype)
    layer.write_slot(1, (first,))
    layer.write_slot(2, (second,))
    layer.write_slot(3, None)
    step.set_mapping(ADAPTERS, {5: 2, 8: 3})
    found = embedding(IDS, weight, layer.handle)
    assert second.up_RO is not None
    assert second.down_RI is not None
    whole = (weight.double() + second.up_RO.double().T @ second.down_RI.double())[IDS]
    mine = torch.tensor([adapter == 5 for adapter in ADAPTERS])
    assert torch.equal(found[~mine], weight[IDS][~mine]), "others' rows are the base's, to the bit"
    assert float((found[mine].double() - whole[mine]).abs().max()) < (1e-5 if dtype == torch.float32 else 0.02)
    # Padding behind the step's tokens has no adapter, and a cleared slot no term.
    padded = embedding(torch.cat([IDS, IDS[:2]]), weight, layer.handle)
    assert torch.equal(padded[: len(IDS)], found)
    assert torch.equal(padded[len(IDS) :], weight[IDS[:2]])
    layer.write_slot(2, None)
    assert torch.equal(embedding(IDS, weight, layer.handle), weight[IDS])


def test_products_scale_the_width_and_the_tokens() -> None:
    """As DoRA's columns are, and as a product with both sides would be."""
    step, g = Step(), torch.Generator().manual_seed(4)
    weight, layer = made(step)
    a, b = torch.randn(2, WIDTH, generator=g), torch.randn(2, VOCABULARY, generator=g)
    layer.write_slot(1, (SliceTerms(None, a, b),))
    step.set_mapping([5] * len(IDS), {5: 1})
    assert torch.allclose(embedding(IDS, weight, layer.handle), (weight * (b.T @ a))[IDS], atol=1e-6)


def test_rows_in_the_bases_place_are_picked_by_id_in_any_order() -> None:
    g = torch.Generator().manual_seed(3)
    rows = torch.randperm(VOCABULARY, generator=g)[:4]
    term = RowsAdded(torch.randn(4, WIDTH, generator=g), rows, VOCABULARY)
    whole = torch.zeros(VOCABULARY, WIDTH).index_copy_(0, rows, term.matrix_NI)
    ids = torch.arange(VOCABULARY, dtype=torch.int32)  # as vLLM has them
    assert torch.equal(term.picked(ids), whole)


def test_a_look_up_does_not_say_that_the_layers_behind_it_were_served() -> None:
    step = Step()
    weight, layer = made(step)
    layer.write_slot(1, (terms(2, 1),))
    step.set_mapping(ADAPTERS, {5: 1, 8: 2})
    step.begin()
    embedding(IDS, weight, layer.handle)
    with pytest.raises(StepError, match="output is the base model's"):
        step.verify()


def test_the_op_is_opaque_to_tracers() -> None:
    step = Step()
    weight, layer = made(step)
    layer.write_slot(1, (terms(2, 1),))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, weight, layer.handle) * 2

    assert torch.equal(model(IDS), weight[IDS] * 2)
    step.set_mapping(ADAPTERS, {5: 1, 8: 2})
    changed = model(IDS)
    assert not torch.equal(changed, weight[IDS] * 2)
    assert torch.equal(changed, layer.forward(IDS) * 2)
