"""An adapter folder whose names or extra weights keep it from being served -> the same adapter as PEFT saves it.

Names are rewritten, and weights that equal the base model's are dropped: they change nothing. Whatever else is at fault
stays at fault; nothing is dropped without a note.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.base_model import BaseModel, base_layout
from flora_vllm.formats.base_probe import read_tensor
from flora_vllm.formats.config_keys import check_config
from flora_vllm.formats.families.family import Family
from flora_vllm.formats.families.table import family_of
from flora_vllm.formats.files import CONFIG_NAME, SIDECAR_NAME, WEIGHTS_NAME
from flora_vllm.formats.foreign import Config, Found, Tensors, as_json
from flora_vllm.formats.names import OF_BASE, PREFIX, saved_part, split_name
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files
from flora_vllm.formats.token_rows import module_of_rows
from flora_vllm.formats.trainer_names import as_peft_names
from flora_vllm.formats.writer import publish

# How names of whole weights beside an adapter differ from the base model's.
_SAVED_AS = (".base_layer.", ".original_module.", ".modules_to_save.default.", ".modules_to_save.")


def repaired(found: Found, base: BaseModel | None = None) -> Found:
    """`found` under PEFT's names, without what equals `base`. Raises AdapterError where that is not one adapter."""
    name, family = family_of(found.config)
    if family is None:
        raise AdapterError(f"{CONFIG_NAME}: peft_type {name!r} is no family that is read")
    renamed, notes = _renamed(found, family)
    tensors, dropped = _without_base(renamed, found.config, family, base)
    config = _adjusted(found.config, set(tensors) | set(renamed), dropped)
    if dropped:
        notes.append(f"dropped {len(dropped)} weights equal to the base model's: {_some(dropped)}")
    return Found(config, tensors, found.sidecar, (*found.notes, *notes))


def write(found: Found, path: Path, base: BaseModel | None = None) -> None:
    """Write `found` as a directory at `path`; an adapter that is there is replaced.

    Raises AdapterError if the result could not be served, or if the directory holds anything else.
    """
    files = {
        CONFIG_NAME: as_json(found.config),
        WEIGHTS_NAME: bytearray(save(found.tensors, metadata={"format": "pt"})),
        **({} if found.sidecar is None else {SIDECAR_NAME: as_json(found.sidecar)}),
    }
    layout = None if base is None else base_layout(base)
    faults = examine_files(files, layout, Limits(), _first_task(found.config)).faults
    if faults:
        raise adapter_error(os.fspath(path), faults)
    publish(path, files)


def _renamed(found: Found, family: Family) -> tuple[Tensors, list[str]]:
    nested = bool(found.config.get("target_parameters"))
    origins: dict[str, str] = {}
    for old in found.tensors:
        new = as_peft_names(family, old, nested)
        if new in origins:
            raise AdapterError(
                f"tensors {origins[new]!r} and {old!r} would both be {new!r}: it holds more than one adapter, or one "
                "twice; save the one that is meant alone"
            )
        origins[new] = old
    changed = [(old, new) for new, old in origins.items() if old != new]
    notes = [f"renamed {len(changed)} tensors, such as {changed[0][0]} to {changed[0][1]}"] if changed else []
    return {new: found.tensors[old] for new, old in origins.items()}, notes


def _without_base(
    tensors: Tensors, config: Config, family: Family, base: BaseModel | None
) -> tuple[Tensors, list[str]]:
    """`tensors` without whole weights that equal the base's, and the names of those."""
    whole = [name for name in tensors if split_name(family, name) is None and module_of_rows(name) is None]
    kept = config.get("modules_to_save")
    names = tuple(name for name in kept if isinstance(name, str)) if isinstance(kept, list) else ()
    parts = {name: saved_part(name, names, within=True) for name in whole}
    # Of the base's own weight under a wrapper nothing but the base's can be served.
    strange = [name for name, part in parts.items() if part is None or part[0].endswith(OF_BASE)]
    if strange and base is None:
        raise AdapterError(
            f"{len(strange)} tensors are no part of {family.name}, such as {_some(strange)}; if they are weights of "
            "the base model, give it too: `flora-vllm convert --repair BASE DIR OUT` drops what is equal to it"
        )
    dropped = [name for name in whole if base is not None and equals_base(name, tensors[name], base)]
    if others := [name for name in strange if name not in dropped]:
        raise AdapterError(
            f"{len(others)} tensors are no part of {family.name} and not equal to the base model's ({_some(others)}); "
            "they would change the result, and cannot be served"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}, dropped


def equals_base(name: str, tensor: torch.Tensor, base: BaseModel) -> bool:
    """Whether the base model has these numbers under the adapter's name for them."""
    return any(
        torch.equal(read_tensor(base, candidate).float(), tensor.float())
        for candidate in _base_names(name)
        if candidate in base.records
    )


def changed_of(base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those that are not the base's numbers."""
    return [name for name, tensor in tensors.items() if not equals_base(name, tensor, base)]


def _base_names(name: str) -> Iterator[str]:
    plain = name.removeprefix(PREFIX).removeprefix("module.")
    for mark in _SAVED_AS:
        plain = plain.replace(mark, ".")
    # Saved without its head, a model's files leave out the first word.
    yield from (plain, plain.partition(".")[2])


def _adjusted(config: Config, names: set[str], dropped: list[str]) -> Config:
    """The config for the new names: no module saved whole that was dropped, Tinker's name of the output layer gone."""
    config = dict(config)
    whole = config.get("modules_to_save")
    if isinstance(whole, list) and dropped:
        kept = names.difference(dropped)
        left = [
            entry
            for entry in whole
            if not any(f".{entry}." in f".{name}" for name in dropped)
            or any(f"{entry}." in name for name in kept)  # by any ending, as PEFT reads it
        ]
        config["modules_to_save"] = left or None
    targets = config.get("target_modules")
    if isinstance(targets, list) and "unembed_tokens" in targets and any(".lm_head." in name for name in names):
        config["target_modules"] = ["lm_head" if entry == "unembed_tokens" else entry for entry in targets]
    return config


def _first_task(config: Mapping[str, object]) -> str | None:
    """A task to read it by, if it has several; a config that cannot say so is at fault, which reading tells."""
    _, family = family_of(config)
    if family is None or (checked := check_config(config, family.keys)).bad:
        return None
    return next(iter(family.tasks(checked.values)), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
