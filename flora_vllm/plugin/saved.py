"""Embeddings and output layers that an adapter's file holds whole: whether they are the base's.

PEFT writes them beside many adapters (`modules_to_save`, `save_embedding_layers`), changed or not. Equal ones change
nothing; others cannot be served yet.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from flora_vllm.formats.names import saved_module


def saved_faults(
    model: torch.nn.Module, rename: Callable[[str], str], saved: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """A fault for each of `saved` that is not this rank's part of the base model's weight."""
    modules = dict(model.named_modules(remove_duplicate=False)) if saved else {}
    for tensor_name, tensor in saved.items():
        name = saved_module(tensor_name) or tensor_name
        layer: Any = modules.get(rename(name))
        if layer is None:
            yield f"module {name!r} is saved whole and not in the base model; was the adapter trained on another model?"
        elif isinstance(layer, VocabParallelEmbedding) and not _is_equal(layer, tensor):
            yield (
                f"module {name!r} is saved whole and differs from the base model's; embeddings and output layers of an "
                "adapter's own are not served yet: train without modules_to_save and with save_embedding_layers=False"
            )


def _is_equal(layer: Any, tensor: torch.Tensor) -> bool:
    if tuple(tensor.shape) != (layer.org_vocab_size, layer.embedding_dim):
        return False
    part = layer.shard_indices
    mine = tensor[part.org_vocab_start_index : part.org_vocab_end_index]
    held = layer.weight[: len(mine)]
    return torch.equal(mine.to(held.device, held.dtype), held)
