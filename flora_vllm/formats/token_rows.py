"""Rows of embeddings that a LoRA holds in the base's place: PEFT's `trainable_token_indices`.

The rows of the file are those of the config's tokens, in their order (`peft/tuners/trainable_tokens/layer.py`). Where
the output layer shares the embedding's weight it gets the same rows, unless the file has other ones of it
(`peft/utils/other.py::set_additional_trainable_modules`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flora_vllm.adapter import ModelLayout
from flora_vllm.formats.config_keys import CheckedConfig
from flora_vllm.formats.families.family import Part
from flora_vllm.formats.module_faults import Records, refusal, tensor_faults
from flora_vllm.formats.names import PREFIX
from flora_vllm.pacing import pace
from flora_vllm.terms import Replaced

KEY = "trainable_token_indices"
_NAME = re.compile(rf"{re.escape(PREFIX)}(.+)\.token_adapter\.trainable_tokens_delta\Z")


@dataclass(frozen=True)
class TokenRows:
    """Module -> its tokens, those of the file and output layers that share the weight of one."""

    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)  # module -> the module whose rows it has
    faults: tuple[str, ...] = ()


def module_of_rows(name: str) -> str | None:
    """The module that a tensor has rows of; None if it has none."""
    found = _NAME.match(name)
    return None if found is None else found[1]


def token_rows(config: CheckedConfig, records: Records, layout: ModelLayout | None) -> TokenRows:
    """What the config and the file's rows, by module, come to; every fault of both."""
    asked: Any = config.values.get(KEY)
    if config.bad & {KEY} or not (asked or records):
        return TokenRows()
    by_name: Mapping[str, Sequence[int]] = asked if isinstance(asked, dict) else {"": asked or ()}
    tokens: dict[str, Sequence[int]] = {}
    faults: list[str] = []
    unused = set(by_name)
    for module, record in records.items():
        pace()
        endings = (module[first:] for first in range(len(module) + 1))
        names = [name for name in endings if name in by_name]
        if len(names) != 1:
            faults.append(
                f"tensor {record.name!r} has rows of tokens, and {KEY} names {len(names)} times which; save it again"
            )
            continue
        unused.discard(names[0])
        tokens[module] = by_name[names[0]]
        faults += _module_faults(module, tokens[module], layout)
        shape = None if layout is None else layout.shape_of(module)
        sizes = {} if shape is None else {"I": shape[1]}
        faults += tensor_faults(record, Part((len(tokens[module]), "I")), (), sizes)
    source = {module: module for module in tokens}
    places = set() if layout is None else {*map(layout.rename, tokens)}
    for module in tokens if layout is not None else ():
        assert layout is not None, "asked above"
        head = layout.tied.get(layout.rename(module))
        if head is not None and head not in places:
            source[head] = module
            unused = {name for name in unused if not (head.endswith(name) and by_name[name] == tokens[module])}
    if layout is None and any(by_name[name] in tokens.values() for name in unused):
        unused = set()  # whether their weight is shared only the base model tells
    faults += [f"{KEY} names tokens{f' of {name!r}' if name else ''} whose rows are not in the file" for name in unused]
    for head in source.keys() - tokens.keys():
        faults += _module_faults(head, tokens[source[head]], layout)
    every = tokens | {head: tokens[module] for head, module in source.items()}
    return TokenRows(every, source, tuple(faults))


def terms_of(rows: TokenRows, module: str, tensors: Mapping[str, torch.Tensor]) -> Replaced:
    """`tensors`: module -> its rows in the file."""
    return Replaced(tensors[rows.source[module]], torch.tensor(rows.tokens[module], dtype=torch.int64))


def _module_faults(module: str, tokens: Sequence[int], layout: ModelLayout | None) -> list[str]:
    if (reason := refusal(module, layout)) is not None:
        return [f"tokens of module {module!r} cannot be replaced: {reason}; train without {KEY}"]
    shape = None if layout is None else layout.shape_of(module)
    if layout is not None and shape is None:
        return [f"module {module!r} is not in the base model; was the adapter trained on another model?"]
    if shape is not None and tokens and max(tokens) >= shape[0]:
        return [f"{KEY}: token {max(tokens)} of module {module!r} is beyond the base model's {shape[0]} tokens"]
    return []
