"""What a checkpoint may address in a model, by the names of the checkpoint."""

import functools
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from flora_vllm.adapter import ModelLayout
from flora_vllm.plugin.attach import Attached
from flora_vllm.plugin.module_names import renamer


def model_layout(attached: Attached, model: torch.nn.Module) -> ModelLayout:
    """What a checkpoint may address in this model, on whichever rank, by the names of the checkpoint."""
    shapes: dict[str, tuple[int, int]] = {}
    for layout in (*attached.layouts.values(), *attached.elsewhere):
        for part in layout.slices:
            shapes[part.module] = (part.full_size, layout.full_in_features)
    refused, experts = dict(attached.refused), dict(attached.experts)
    own = ModelLayout(shapes, experts=experts)
    # The parts of queries, keys and values are not laid out in one way by all checkpoints; other parts are.
    fused = {
        layout.module: (layout.full_out_features, layout.full_in_features)
        for layout in attached.layouts.values()
        if layout.module not in shapes and not layout.holds_qkv and not own.is_of_expert(layout.module)
    }
    norms = frozenset(attached.norms)
    embeddings, tied = frozenset(attached.embeddings), _tied(attached, model)
    for other in _of_other_stages((shapes, refused, fused, experts, embeddings, tied, norms)):
        shapes |= other[0]
        refused |= other[1]
        fused |= other[2]
        experts |= other[3]
        embeddings |= other[4]
        tied |= other[5]
        norms |= other[6]
    of_experts = {name for name in shapes if own.is_of_expert(name)}
    known = {*shapes, *refused, *fused, *experts} - of_experts
    # Asked several times for each of an adapter's hundreds of modules.
    rename = functools.lru_cache(maxsize=1 << 16)(renamer(model, known, of_experts))
    never_run = tuple(getattr(model, "lora_skip_prefixes", None) or ())  # stock's own rule for whom it does not name
    return ModelLayout(shapes, refused, rename, fused, experts, embeddings, tied, norms, never_run)


def _tied(attached: Attached, model: Any) -> dict[str, str]:
    """Embedding -> the output layer that shares its weight in this model, whatever the engine holds of it."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False) or hasattr(model, "pooler"):
        return {}
    heads = [name for name, module in model.named_modules() if isinstance(module, ParallelLMHead)]
    return dict.fromkeys(attached.embeddings, heads[0] if heads else "lm_head")


def _of_other_stages(own: Any) -> list[Any]:
    """The same of every stage of the pipeline; nothing where there is one."""
    group = get_pp_group()
    if group.world_size == 1:
        return []
    found = [None] * group.world_size
    torch.distributed.all_gather_object(found, own, group=group.cpu_group)
    return found
