"""What a family tells the reader: its config keys, its tensors' names and axes, and how they become terms.

A family is one `Family` value in its own file and one row in `table.py`; nothing else changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flora_vllm.adapter import ModuleTerms
from flora_vllm.formats.config_keys import Key

# The keys of adapter_config.json whose values are allowed.
Config = Mapping[str, Any]

# Axis letters of a tensor: R the module's rank, I in features, O out features, "1" exactly one.
Axes = tuple[Literal["R", "I", "O", "1"], ...]


@dataclass(frozen=True)
class Family:
    """One PEFT method.

    `parts`: the tensors every adapted module has, named `base_model.model.<module>.<part>`.
    `axes(config, module)`: part -> its axes; empty if the config cannot tell.
    `ranks(config, module)`: the ranks the config allows for the module; empty if the method has none.
    `terms(config, module, parts)`: the canonical form; called only if the whole checkpoint has no fault.
    `limit`: which of the reader's rank limits counts this family's ranks.
    """

    name: str
    keys: Mapping[str, Key]
    parts: tuple[str, ...]
    axes: Callable[[Config, str], Mapping[str, Axes]]
    ranks: Callable[[Config, str], tuple[int, ...]]
    terms: Callable[[Config, str, Mapping[str, torch.Tensor]], ModuleTerms]
    limit: Literal["flora", "lora"] | None
