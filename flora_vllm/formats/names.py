"""Names of a checkpoint's tensors: which module and part each is, by the family's row."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from flora_vllm.formats.config_keys import SAVED_WHOLE
from flora_vllm.formats.families.family import Family
from flora_vllm.formats.families.table import CONDITIONAL, CONDITIONAL_MARK, REFUSED_VARIANTS

ROOT = "base_model."
PREFIX = "base_model.model."

_HINTS: Mapping[str, str] = {
    CONDITIONAL_MARK: f"it is a router of {CONDITIONAL}, which is not served: {REFUSED_VARIANTS[CONDITIONAL]}",
    "embedding_A": "it adapts an embedding, which is supported for plain LoRA only",
    "embedding_B": "it adapts an embedding, which is supported for plain LoRA only",
    "lora_magnitude_vector": "it belongs to DoRA, and the config does not say use_dora",
    "lora_B.bias": "it is a LoRA bias, and the config does not say lora_bias",
    **dict.fromkeys(("lora_", "flora_", "hira_", "ia3_"), "it belongs to another family or has a part too many"),
}
_OTHER = "whole weights beside the adapter must be of modules that modules_to_save names, or of embeddings and heads"


def split_name(family: Family, name: str) -> tuple[str | None, str] | None:
    """(module path, part) of a module's tensor, (None, part) of the whole adapter's; None if the row has no such."""
    of_module, of_adapter = _patterns(family.names, family.shared_names)
    found = of_module.match(name)
    if found is not None:
        return found[1], found[2]
    found = of_adapter.match(name)
    return None if found is None else (None, found[1])


# What PEFT's wrappers keep of the base's own weight, under a path of its own.
OF_BASE = (".base_layer", ".original_module")
_WHOLE = re.compile(rf"{re.escape(PREFIX)}(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)\Z")


def saved_part(name: str, kept: Sequence[str] = (), *, within: bool = False) -> tuple[str, str] | None:
    """(module path, "weight" or "bias") of a tensor of a module that the file holds whole; None if it is no such.

    Those are embeddings and output layers, and what the config's `modules_to_save` names as PEFT reads it: by any
    ending. `within`: also what lies in a module that it names. The path ends with one of OF_BASE for a wrapper's copy
    of the base's weight.
    """
    found = _WHOLE.match(name)
    if found is None:
        return None
    path, kind = found[1], found[2]
    module = path
    for ending in OF_BASE:
        module = module.removesuffix(ending)
    is_known = kind == "weight" and module.rpartition(".")[2] in SAVED_WHOLE
    is_named = module.endswith(tuple(kept)) or (within and any(f"{entry}." in module for entry in kept))
    return (path, kind) if is_known or is_named else None


def not_understood(family: Family, name: str) -> str:
    """The fault of a tensor that the row does not name."""
    hint = next((hint for mark, hint in _HINTS.items() if mark in name), _OTHER)
    known = [f"{PREFIX}<module>.{part}" for part in family.names] + [f"{ROOT}{part}" for part in family.shared_names]
    return f"tensor {name!r} is not understood: {hint}; family {family.name} has {' and '.join(known)}"


@lru_cache(maxsize=256)
def _patterns(names: tuple[str, ...], shared_names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    # The shortest module: of `x.base_layer.bias` the part is all that the row names, not its last word.
    of_module = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({_either(names)})\Z", re.DOTALL)
    return of_module, re.compile(rf"{re.escape(ROOT)}({_either(shared_names)})\Z")


def _either(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name).replace(r"\*", r"[^.]+") for name in names) or r"(?!)"


def part_of(parts: Mapping[str, object], name: str) -> str | None:
    """The entry of `parts` that names `name`, by itself or with a `*` for a number."""
    if name in parts:
        return name
    return next((pattern for pattern in parts if "*" in pattern and _fits(pattern, name)), None)


@lru_cache(maxsize=4096)
def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(_either((pattern,)), name) is not None
