"""Modules that an adapter's file holds whole: no change where they are the base's, terms of the adapter where not.

PEFT writes them beside many adapters (`modules_to_save`, `save_embedding_layers`), changed or not.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer

from flora_vllm.adapter import Adapter, ModelLayout, ModuleTerms
from flora_vllm.errors import AdapterError
from flora_vllm.formats.activation import EVERYWHERE
from flora_vllm.formats.base_model import is_conv1d
from flora_vllm.formats.families.ln_tuning import norm_terms
from flora_vllm.formats.module_faults import refusal
from flora_vllm.formats.names import OF_BASE
from flora_vllm.formats.ranks import Limits, built_faults
from flora_vllm.norms import AdaptedNorm
from flora_vllm.terms import Offset, Replaced, Term, check_fit

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPARED_ROWS = 4096


def with_saved(
    adapter: Adapter,
    model: torch.nn.Module,
    layout: ModelLayout,
    limits: Limits,
    norms: Mapping[str, AdaptedNorm],
) -> tuple[Adapter, list[str]]:
    """`adapter` with terms for each module that it holds whole and that is not this rank's part of the base's, and why
    that cannot be for some; `saved` is then what differs. `norms`: those of the model that adapters may change."""
    if not adapter.saved:
        return adapter, []
    known = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.saved.items():
        module, _, kind = name.rpartition(".")
        tensors.setdefault(module, {})[kind] = tensor
    modules, changed, faults = dict(adapter.modules), {}, []
    taken = {layout.rename(module) for module in modules}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for path, found in tensors.items():
        module = path
        for ending in OF_BASE:
            module = module.removesuffix(ending)
        layer = known.get(layout.rename(module))
        if isinstance(layer, PPMissingLayer):  # another pipeline stage has it, and judges it
            continue
        norm = norms.get(layout.rename(module))
        held = norm.base_values() if norm is not None else {kind: getattr(layer, kind, None) for kind in found}
        if all(_is_equal(layer, kind, held.get(kind), tensor) for kind, tensor in found.items()):
            continue
        changed |= {f"{path}.{kind}": tensor for kind, tensor in found.items()}
        try:
            if is_conv1d(model_type, module) and layout.rename(module) not in layout.norms:
                raise AdapterError(f"{model_type} stores linear layers the other way round; train without it")
            terms = _terms(path, module, found, layout, layer)
            if adapter.invocation_tokens is not None:
                raise AdapterError(EVERYWHERE)
            if layout.rename(module) in taken:
                raise AdapterError(
                    "it has tensors under another name or of the adapter's family, too; keep those of one"
                )
            taken.add(layout.rename(module))
            modules[module] = ModuleTerms(terms)
        except AdapterError as error:
            faults.append(f"module {module!r} is saved whole and differs from the base model's: {error}")
    adapter = replace(adapter, modules=modules, saved=changed)
    return adapter, [*faults, *built_faults(modules, limits)]


def _terms(
    path: str, module: str, found: Mapping[str, torch.Tensor], layout: ModelLayout, layer: torch.nn.Module | None
) -> tuple[Term, ...]:
    if path != module:
        raise AdapterError("it is what the base's own weight was in training; serve that base model")
    if (reason := refusal(module, layout)) is not None:
        raise AdapterError(f"{reason}; train without it in modules_to_save")
    shape = layout.shape_of(module)
    if shape is None and layer is None:
        raise AdapterError("it is not in the base model; was the adapter trained on another model?")
    if shape is None:
        raise AdapterError(f"modules such as this {type(layer).__name__} cannot be an adapter's own; train without it")
    if layout.rename(module) in layout.norms:
        if "weight" not in found or any(tensor.shape != shape[:1] for tensor in found.values()):
            raise AdapterError(f"its weight and bias are not of the base's size {shape[:1]}; save the whole norm")
        return norm_terms(found["weight"], found.get("bias"))
    if "bias" in found and layout.rename(module) in layout.embeddings:
        raise AdapterError("an embedding has no bias; remove it")
    terms: list[Term] = []
    if "weight" in found:
        terms.append(Replaced(found["weight"]))
    if "bias" in found:
        terms.append(Offset(found["bias"], replaces=True))
    try:
        check_fit(shape, terms)
    except AdapterError:
        sizes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in found.items())
        raise AdapterError(
            f"it is of another size ({sizes}) than the base's {shape}; serve a base of that size"
        ) from None
    return tuple(terms)


def _is_equal(layer: Any, kind: str, held: Any, tensor: torch.Tensor) -> bool:
    # Some modules have a flag of this name; and quantised numbers are not the weight's.
    if not isinstance(held, torch.Tensor) or held.ndim == 0 or held.dtype not in _FLOATS:
        return False
    if isinstance(layer, VocabParallelEmbedding) and kind == "weight":
        if tuple(tensor.shape) != (layer.org_vocab_size, layer.embedding_dim):
            return False
        part = layer.shard_indices
        tensor = tensor[part.org_vocab_start_index : part.org_vocab_end_index]
        held = held[: len(tensor)]
    if tensor.shape != held.shape:
        return False
    # By parts: a whole output layer has no room beside the model on its device, and most differ in the first.
    parts = zip(tensor.split(_COMPARED_ROWS), held.split(_COMPARED_ROWS), strict=True)
    return all(torch.equal(part.to(held.device, held.dtype), own) for part, own in parts)
