"""What a checkpoint calls a module -> what the engine calls it."""

from collections.abc import Callable, Collection
from typing import Any

import torch

_EXPERTS = ".experts"


def renamer(model: torch.nn.Module, known: Collection[str], of_experts: Collection[str] = ()) -> Callable[[str], str]:
    """A checkpoint's module path -> the engine's: by the model's own weight mapper, and where there is no such module
    by what stands before it: an adapter of a headless model (`layers.0...`) fits the one with a head
    (`model.layers.0...`), if only one module can be meant; one of the text model alone, the multimodal one.

    Of experts `known` has the path alone, and `of_experts` their linear layers. What holds a layer's experts has one
    name in transformers (`mlp.experts`) and another in some engines and checkpoints (`block_sparse_moe.experts`): a
    layer has experts once."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = getattr(mapper, "get_rename_mapper", None)
    if renames is not None:
        mapper = renames()
    text_names = _text_names(model, known)
    endings = _endings(known)

    def mapper_name(module: str) -> str:
        if mapper is None:
            return module
        return (mapper._map_name(f"{module}.weight") or f"{module}.weight").removesuffix(".weight")

    def rename(module: str) -> str:
        path, number, name = ("", "", *module.rsplit(".", 2))[-3:]
        if number.isdecimal() and path.endswith(_EXPERTS):
            place = f"{rename(path)}.{number}"
            # Mappers are made for the names of a checkpoint's tensors, among which those of parameters may look alike.
            other = mapper_name(module).rpartition(".")[2]
            return f"{place}.{other if f'{place}.{other}' in of_experts else name}"
        mapped = mapper_name(module)
        if mapped in known:
            return mapped
        if mapped.endswith(_EXPERTS):
            layer = mapped.rsplit(".", 2)[0]
            longer = endings.get(mapped) or endings.get(f"{layer}.*{_EXPERTS}") or []
            return longer[0] if len(longer) == 1 else mapped
        if module in text_names:
            return text_names[module]
        longer = endings.get(mapped) or endings.get(module) or []
        return longer[0] if len(longer) == 1 else mapped

    return rename


def _endings(known: Collection[str]) -> dict[str, list[str]]:
    """What a path ends in -> such paths; of experts also with `*` for the name of what holds them."""
    endings: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for i in range(1, len(parts)):
            endings.setdefault(".".join(parts[i:]), []).append(name)
        if name.endswith(_EXPERTS):
            parts[-2] = "*"
            for i in range(len(parts) - 2):
                endings.setdefault(".".join(parts[i:]), []).append(name)
    return endings


def _text_names(model: Any, known: Collection[str]) -> dict[str, str]:
    """What a trainer of the text model alone calls modules of a multimodal model's language model -> their paths.

    By vLLM 0.33's rule: the rest behind the language model's prefix, where that holds a bare decoder below `model.`.
    """
    if not hasattr(model, "get_mm_mapping") or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    prefix = next((f"{name.rstrip('.')}." for name in model.get_mm_mapping().language_model), None)
    if prefix is None:
        return {}
    names: dict[str, str] = {}
    for path in known:
        if path.startswith(prefix):
            rest = path.removeprefix(prefix)
            names[rest] = path
            if not rest.startswith(("model.", "lm_head")):
                names[f"model.{rest}"] = path
    return names
