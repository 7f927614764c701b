"""An embedding whose vocabulary two ranks share, both in this process: vLLM's own layer, ours under it, their sum."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.adapter import ModuleTerms
from flora_vllm.slots import layer_terms
from flora_vllm.step import Step
from flora_vllm.terms import Added, Product, Replaced

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn

VOCABULARY, WIDTH, RANKS = 100, 6, 2  # padded to 128, so that the second rank has 36 tokens
IDS = torch.tensor([3, 99, 0, 63, 64, 7, 80])
ADAPTERS = (5, 5, 0, 5, 5, 0, 5)


def rank_of(weight: torch.Tensor, rank: int) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    group: Any = SimpleNamespace(rank_in_group=rank, world_size=RANKS, all_reduce=lambda tensor: tensor)
    module = VocabParallelEmbedding(len(weight), WIDTH, torch.float32, parallel_group=group)
    module.weight_loader(module.weight, weight)
    return module


def terms() -> dict[str, tuple[Any, ...]]:
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, WIDTH, generator=g), torch.randn(VOCABULARY, 2, generator=g)
    rows = torch.tensor([99, 3, 64])
    return {
        "low rank": (Added(down, up, 0.5),),
        "columns scaled": (Product(input=down[:1]), Added(down, up)),
        "whole": (Replaced(torch.randn(VOCABULARY, WIDTH, generator=g)),),
        "rows": (Replaced(torch.randn(3, WIDTH, generator=g), rows),),
    }


def test_drafts_that_may_look_tokens_up_in_it_keep_it_from_adapters() -> None:
    from flora_vllm.plugin.embeddings import _is_shared_with_drafts

    assert [_is_shared_with_drafts(SimpleNamespace(method=name)) for name in ("ngram", "draft_model")] == [False] * 2
    assert [_is_shared_with_drafts(SimpleNamespace(method=name)) for name in ("eagle", "mtp", "new")] == [True] * 3
    assert not _is_shared_with_drafts(None)


@pytest.mark.parametrize("case", terms())
def test_the_ranks_sum_is_the_adapters_row(case: str) -> None:
    from flora_vllm.plugin.attach import Attached
    from flora_vllm.plugin.embeddings import _take_over
    from flora_vllm.terms import merged

    weight, own = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)), terms()[case]
    step, total, products = Step(), torch.zeros(len(IDS), WIDTH), []
    step.set_mapping(ADAPTERS, {5: 1})
    for rank in range(RANKS):
        attached, module = Attached(), rank_of(weight, rank)
        _take_over("embed", module, attached, step, torch.device("cpu"))
        layout = attached.layouts["embed"]
        attached.write_slot(1, {"embed": layer_terms(layout, {"embed": ModuleTerms(own)}, torch.float32) or ()})
        total += module(IDS)
        products.append(attached.embeddings["embed"].product(torch.eye(WIDTH)))
    wanted, _ = merged(weight, None, own)
    mine = torch.tensor(ADAPTERS) == 5
    assert torch.equal(total[~mine], weight[IDS[~mine]]), "others' rows are the base's, to the bit"
    assert torch.allclose(total[mine], wanted[IDS[mine]], atol=1e-5)
    assert torch.equal(torch.cat(products, 1).T, weight)
