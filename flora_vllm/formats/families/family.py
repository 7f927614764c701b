"""What a family tells the reader: its config keys, its tensors' names and axes, and how they become terms.

A family is one `Family` value in a file beside this one and one row in `table.py`; nothing else changes.
flora_vllm/terms/README.md shows the steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from flora_vllm.formats.config_keys import Key
from flora_vllm.formats.matching import match_pattern
from flora_vllm.formats.patterns import IN_GROUP
from flora_vllm.terms import Term

# The keys of adapter_config.json whose values are allowed.
Config = Mapping[str, Any]

# Axis of a tensor: R the module's rank, I in features, O out features, another letter: of one length in the module;
# a number: exactly that; None: any length.
Axes = tuple[str | int | None, ...]

FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "U8")


@dataclass(frozen=True)
class Part:
    """One tensor. `axes` None: of any shape, for nothing reads it. `optional`: it may be absent. `may_be_empty`: an
    axis may be 0 (a rank pruned away).
    """

    axes: Axes | None
    optional: bool = False
    dtypes: tuple[str, ...] = FLOATS
    may_be_empty: bool = False


@dataclass(frozen=True)
class Scope:
    """What is known of a module before its tensors are looked at; sizes are None without a base model."""

    config: Config
    module: str
    out_features: int | None = None
    in_features: int | None = None
    present: frozenset[str] = frozenset()  # the parts that the file has
    task: str | None = None  # which of the adapter's tasks is asked for

    def by_pattern(self, key: str, default: Any, place: str = IN_GROUP) -> Any:
        """The value for this module of a config key such as `rank_pattern`; `place`: what PEFT makes of its keys."""
        return match_pattern(self.config.get(key) or {}, self.module, default, place)


@dataclass(frozen=True, eq=False)
class ModuleFile:
    """One module's tensors, checked; `shared`: the adapter-wide ones."""

    scope: Scope
    tensors: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor]

    @property
    def config(self) -> Config:
        return self.scope.config

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.tensors[part]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def get(self, part: str) -> torch.Tensor | None:
        return self.tensors.get(part)


@dataclass(frozen=True)
class Family:
    """One row: a PEFT method, or a variant of one that the config's flags turn on.

    `names`: every tensor a module may have, as `base_model.model.<module>.<name>`; `*` stands for a number.
    `parts(scope)`: those it must or may have here, with their axes; empty if the config cannot tell.
    `sidecar_keys`: keys of flora_sidecar.json, which `config` then has beside those of the config.
    `alone`: names that need no partner (biases, which every module may have).
    `of_embeddings`: names that an embedding's tensors have, and no other module's; without them it adapts none.
    `of_heads`: those of them that a tied output layer has too, whether the config selects it or not.
    `of_norms`: it adapts norms, and nothing else.
    `shared_names`, `shared_parts(config)`: the same of tensors the whole adapter has once, `base_model.<name>`.
    `ranks(scope)`: what R may be; empty if the method has none. `terms(module)`: the canonical form, called only if the
    whole checkpoint has no fault; raises AdapterError for what only it can see. `kinds`: the terms it may become, that
    which README counts it by first.
    `tasks(config)`: what a user may ask for after a `#`; empty if the adapter is one thing. `implied(config)`: whether
    every module that the config selects is adapted without tensors of its own. `caution`: what its user must know.
    `by_structure`: whether each number of a term is one of the file's or follows from the config alone.
    `rank_key`: the config's key of the rank. `limit`: which rank limit counts the rank that the config states.
    `when`: whether the flags make it this row.
    """

    name: str
    title: str  # as README names it
    keys: Mapping[str, Key]
    names: tuple[str, ...]
    parts: Callable[[Scope], Mapping[str, Part]]
    terms: Callable[[ModuleFile], tuple[Term, ...]]
    ranks: Callable[[Scope], tuple[int, ...]] = lambda _scope: ()
    limit: Literal["flora", "lora"] | None = None
    peft_type: str | None = None  # if not the name
    when: Callable[[Mapping[str, Any]], bool] = lambda _config: True
    alone: frozenset[str] = frozenset()
    of_embeddings: tuple[str, ...] = ()
    of_heads: frozenset[str] = frozenset()
    of_norms: bool = False
    sidecar_keys: Mapping[str, Key] = field(default_factory=dict)
    shared_names: tuple[str, ...] = ()
    shared_parts: Callable[[Config], Mapping[str, Part]] = lambda _config: {}
    kinds: tuple[type, ...] = ()
    tasks: Callable[[Config], tuple[str, ...]] = lambda _config: ()
    implied: Callable[[Config], bool] = lambda _config: False
    rank_key: str = "r"
    caution: str = ""
    by_structure: bool = False
    note: str = ""  # for README: what is special, in a few words

    @property
    def type_name(self) -> str:
        """The `peft_type` in the config."""
        return self.peft_type or self.name


def pattern_rank(scope: Scope) -> tuple[int, ...]:
    """The one rank a module may have: its `rank_pattern` entry, else `r`."""
    return (scope.by_pattern("rank_pattern", scope.config["r"]),)


def tasks_known(config: Config, key: str) -> tuple[str, ...]:
    """The names of tasks that are numbered from 0 up to the config's `key`."""
    return tuple(str(task) for task in range(config.get(key, 1)))
