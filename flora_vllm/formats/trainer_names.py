"""Tensor names as trainers leave them in a state dict, and what PEFT's saving would have made of each.

PEFT takes the adapter's name out of its tensors' names and puts `base_model.model.` before all of them. Who saves the
wrapped model's own state dict instead (DeepSpeed, FSDP, torch.compile, Lightning, ms-swift, Tinker) leaves other marks.
"""

import re

from flora_vllm.formats.families.family import Family
from flora_vllm.formats.names import PREFIX, ROOT, split_name

# Modules that wrap another one and are no part of the model: torch.compile's, FSDP's, activation checkpointing's.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# What DistributedDataParallel, DeepSpeed and Lightning put in front.
_FRONT = ("module.", "model.base_model.", "base_model.model.base_model.model.")
_BEHIND = {"module.": "", "model.base_model.": ROOT, "base_model.model.base_model.model.": PREFIX}
# Tinker's name of the output layer.
_UNEMBED = re.compile(rf"{re.escape(PREFIX)}(?:model\.)?unembed_tokens\.")
_BASE_LAYER = ".base_layer"
_OF_PARAMETER = f".experts{_BASE_LAYER}"  # the first of two parameters, whoever saved it (experts.py)
_MARKS = (*_WRAPPERS, "base_model.model.base_model.", "unembed_tokens", f"{_BASE_LAYER}.")


def looks_wrapped(name: str) -> bool:
    """Whether a name that can be read may yet need `as_peft_names`; quick, for it is asked of every tensor."""
    return any(mark in name for mark in _MARKS)


def as_peft_names(family: Family, name: str, nested: bool = False) -> str:
    """What PEFT would have called the tensor; `name` itself if it is so already, or if nothing here explains it.

    `nested`: the adapter's parameters may lie in each other (`target_parameters`), where `base_layer` has a meaning.
    """
    outer = _UNEMBED.sub(f"{PREFIX}lm_head.", _without_wrappers(name))
    for found in (outer, PREFIX + outer):
        for candidate in (found, _without_adapter_name(family, found)):
            split = split_name(family, candidate)
            if split is None:
                continue
            module, part = split
            if module is not None and module.endswith(_BASE_LAYER) and not (nested or module.endswith(_OF_PARAMETER)):
                return f"{PREFIX}{module.removesuffix(_BASE_LAYER)}.{part}"
            return candidate
    return name


def _without_wrappers(name: str) -> str:
    name = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
    while front := next((front for front in _FRONT if name.startswith(front)), None):
        name = _BEHIND[front] + name.removeprefix(front)
    return name


def _without_adapter_name(family: Family, name: str) -> str:
    """`….lora_A.<adapter>.weight` as `….lora_A.weight`, `….ia3_l.<adapter>` as `….ia3_l`."""
    for part in sorted({*family.names, *family.shared_names} - family.alone, key=len, reverse=True):
        stem, dot, end = part.rpartition(".")
        if not dot or end not in ("weight", "bias") or not stem:
            stem, end = part, ""
        tail = rf"\.{end}" if end else r"(?:\.weight)?"  # PEFT drops the .weight of DoRA's magnitudes too
        found = re.fullmatch(rf"(.+)\.{re.escape(stem)}\.[^.]+{tail}", name)
        if found and split_name(family, f"{found[1]}.{part}") is not None:
            return f"{found[1]}.{part}"
    return name
