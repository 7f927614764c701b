"""The token embedding of a vLLM model: taking over its look-up where it runs on a step's tokens.

vLLM looks rows up through the quant method's `embedding`, within the model's own forward pass. A rank that has part of
the vocabulary is asked for its own rows; what it gives for others' ids is not used. Where something else may look rows
up too (a draft model, prompts with embeddings or images in them), adapters are refused.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from flora_vllm.embedding import AdaptedEmbedding
from flora_vllm.plugin.attach import LEFT_OUT, Attached
from flora_vllm.plugin.trial import TOKENS, Trial
from flora_vllm.slots import LinearLayout, SliceLayout
from flora_vllm.step import Step

# Ways to speculate that look nothing up, or in a model that shares nothing with the target.
_WITHOUT_EMBEDDING = frozenset({"ngram", "ngram_gpu", "suffix", "draft_model"})


def embeddings_of(model: Any) -> dict[str, Any]:
    """The embeddings of a step's tokens, by name, ready to be tried."""
    if not get_pp_group().is_first_rank:
        # Where it is here at all, its weight is the output layer's; the first stage says what may be done to it.
        return {}
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    for module in found.values():
        # A kernel of vLLM's that does the same in one pass, beside the quant method.
        module.use_fused_embedding = False
    return found


def attach_embeddings(
    trial: Trial,
    model: Any,
    attached: Attached,
    step: Step,
    only: Callable[[str], bool],
    config: Any,
    device: torch.device,
) -> None:
    """Take over every embedding that adapters may change, and have `attached` say why of the others.

    `step`: that of the model's tokens. `only`: the operator's restriction to some modules.
    """
    for name, module in trial.embeddings.items():
        reason = _refusal(name, module, model, only, config) or trial.fault
        if reason is not None:
            attached.refused[name] = reason
        elif trial.rows.get(name) != [TOKENS]:
            attached.refused[name] = (
                "the model looks up other rows in it than a step's tokens, where adapters cannot follow"
            )
        else:
            _take_over(name, module, attached, step, device)


def vocabulary_part(name: str, module: Any) -> SliceLayout | None:
    """This rank's part of the vocabulary of an embedding or output layer; None if adapters cannot follow its layout."""
    # Tokens added to a vocabulary lie behind its padding, and a rank behind all tokens has no part to cut.
    per_rank = module.num_embeddings_per_partition
    if module.num_added_embeddings or (module.tp_size - 1) * per_rank >= module.org_vocab_size:
        return None
    mine = module.shard_indices
    return SliceLayout(
        name,
        mine.num_org_elements,
        mine.org_vocab_start_index,
        mine.org_vocab_start_index,
        module.org_vocab_size,
    )


def _refusal(name: str, module: Any, model: Any, only: Callable[[str], bool], config: Any) -> str | None:
    faults = {
        LEFT_OUT: not only(name),
        "it is quantised": type(module.quant_method) is not UnquantizedEmbeddingMethod,
        "its vocabulary is laid out in a way that adapters cannot follow": vocabulary_part(name, module) is None,
        "the prompts of a multimodal model are not all tokens": hasattr(model, "get_mm_mapping"),
        "prompts of embeddings have no tokens to look up in it": config.model_config.enable_prompt_embeds,
        "the draft model may look tokens of its own up in it": _is_shared_with_drafts(config.speculative_config),
    }
    return next((f"embeddings cannot be adapted here: {fault}" for fault, holds in faults.items() if holds), None)


def _is_shared_with_drafts(speculative: Any) -> bool:
    """Whether what drafts tokens may have the target's embedding: EAGLE, MTP and their kin do."""
    return speculative is not None and speculative.method not in _WITHOUT_EMBEDDING


def _take_over(name: str, module: Any, attached: Attached, step: Step, device: torch.device) -> None:
    method = module.quant_method
    stock_embedding = method.embedding

    def base(ids: torch.Tensor) -> torch.Tensor:
        return stock_embedding(module, ids)

    part, width = vocabulary_part(name, module), module.embedding_dim
    assert part is not None, "asked before"

    def product(x_NH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x_NH, module.weight[: part.size])

    layer = AdaptedEmbedding(base, product, step, device)
    attached.layouts[name] = LinearLayout(name, width, 0, width, (part,), part.full_size)
    attached.dtypes[name] = module.params_dtype
    attached.biases[name] = None
    attached.embeddings[name] = layer
    module._flora_handle = layer.handle
    module.quant_method = copy.copy(method)
    module.quant_method.embedding = _embedding


def _embedding(layer: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.ops.flora.embedding(ids, layer.weight, layer._flora_handle)
