"""Every key of an `adapter_config.json` that we understand, and the values we can serve exactly.

A key that is not listed for the family is refused: PEFT adds features as keys, and a key we ignore is a feature we
drop in silence. `BOOKKEEPING` is the one list of keys that never change the result, whatever their value.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flora_vllm.formats import activation
from flora_vllm.formats.limits import MAX_NAME_LETTERS, shown
from flora_vllm.formats.patterns import AFTER_DOT, IN_GROUP, all_speak_re, speaks_re

# True if the value can be served.
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """One config key: which values are allowed, in words and as a test, and whether it must be there."""

    allowed: str
    check: Check
    required: bool = False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is finite, and no integer that torch cannot multiply by."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 63
    return isinstance(value, float) and math.isfinite(value)


def _is_regex(value: object, within: str = "{}") -> bool:
    """Whether `value` compiles where PEFT puts it."""
    return isinstance(value, str) and speaks_re(within.format(value))


def _is_layers_pattern(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_LETTERS and _is_regex(value, r".*?\.{}\.\d+\.")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_pattern_of(check: Check, place: str = IN_GROUP) -> Check:
    return lambda value: (
        value is None
        or (isinstance(value, dict) and all_speak_re(value, within=place) and all(map(check, value.values())))
    )


def is_rank(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and value > 0


def _is_token_list(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(_is_int(token) and 0 <= token < 1 << 31 for token in value)
        and len({*value}) == len(value)
    )


def only(*values: object) -> Key:
    """A key that changes the result unless it has one of these values (type and all: 0 is not False)."""
    return Key(" or ".join(map(repr, values)), lambda value: any(type(value) is type(v) and value == v for v in values))


def integer(first: int, last: int, *, required: bool = False) -> Key:
    """A number of things, or of rounds, that are looked at one by one: with a bound, as a stranger may write any."""
    return Key(f"an integer from {first} to {last}", lambda value: _is_int(value) and first <= value <= last, required)


# Terms of a series, or layers, tasks: several times what any honest adapter has.
SERIES, MAX_TASKS = integer(1, 1000), 4096
ANYTHING = Key("anything", lambda _value: True)
BOOLEAN = Key("true or false", lambda value: isinstance(value, bool))
RANK = Key("an integer of at least 1", is_rank, required=True)
NUMBER = Key("a finite number, an integer below 2^63", is_number, required=True)
RANK_PATTERN = Key("an object of module name or regex -> integer of at least 1", _is_pattern_of(is_rank))
RANK_PATTERN_AFTER_DOT = Key(RANK_PATTERN.allowed, _is_pattern_of(is_rank, AFTER_DOT))
NUMBER_PATTERN = Key("an object of module name or regex -> finite number", _is_pattern_of(is_number))
MODULES = Key(
    "a list of module names or one regular expression",
    lambda v: _is_names(v) or (bool(v) and _is_regex(v)),
    required=True,
)
OPTIONAL_MODULES = Key(
    "null, a list of module names or one regular expression", lambda v: v is None or _is_names(v) or _is_regex(v)
)
LAYERS = Key(
    "null, an integer or a list of integers",
    lambda v: v is None or _is_int(v) or (isinstance(v, list) and all(_is_int(i) for i in v)),
)
LAYERS_PATTERN = Key(
    "null, a name or a list of names",
    lambda v: v is None or _is_layers_pattern(v) or (_is_names(v) and all(map(_is_layers_pattern, v))),
)
# Parameters that transformers has for a layer's experts in place of modules, in the order of the model.
EXPERTS_WHOLE = ("gate_up_proj", "down_proj")
EXPERT_PARAMETERS = Key(
    f"null or names of experts' {' and '.join(EXPERTS_WHOLE)}: other parameters cannot be adapted",
    lambda v: v is None or (_is_names(v) and all(name.rpartition(".")[2] in EXPERTS_WHOLE for name in v)),
)
TOKEN_INDICES = Key(
    "null, a list of different token ids or an object of module name -> such a list",
    lambda v: v is None or _is_token_list(v) or (isinstance(v, dict) and all(map(_is_token_list, v.values()))),
)
NOTHING = Key("null or empty", lambda value: value in (None, [], {}))

# `inference_mode`, `auto_mapping`, … describe the file or how it was trained, not what it computes.
BOOKKEEPING: Mapping[str, Key] = {
    "peft_type": Key("the family's name", lambda value: isinstance(value, str), required=True),
    "auto_mapping": ANYTHING,
    "base_model_name_or_path": Key("null or a string", lambda value: value is None or isinstance(value, str)),
    "inference_mode": ANYTHING,
    "peft_version": ANYTHING,
    "revision": ANYTHING,
    "runtime_config": ANYTHING,
    "task_type": ANYTHING,
}

# Names of modules that a config may say are saved whole: each is looked for in the name of each tensor.
MAX_SAVED = 64
# Embeddings and output layers by the last part of their path: PEFT saves them whole unasked, changed or not.
SAVED_WHOLE = ("embed_tokens", "embed_in", "embed_out", "lm_head", "wte", "word_embeddings")

# `fan_in_fan_out` says how the *base* stores its weight; PEFT's factors are (R, I) and (O, R) either way
# (`lora/layer.py::get_delta_weight` transposes the product, not the factors), so it does not change the terms.
TARGETS: Mapping[str, Key] = {
    "target_modules": MODULES,
    "exclude_modules": OPTIONAL_MODULES,
    "fan_in_fan_out": BOOLEAN,
    "modules_to_save": Key(
        f"null or at most {MAX_SAVED} names of modules that are saved whole",
        # As expressions, with which PEFT keeps what they fit from being adapted.
        lambda value: (
            value is None
            or (_is_names(value) and len(value) <= MAX_SAVED and all_speak_re(value, within=r"(^|.*\.){}($|\..*)"))
        ),
    ),
    activation.KEY: Key(activation.ALLOWED, activation.is_invocation),
}
LAYER_SUBSET: Mapping[str, Key] = {"layers_to_transform": LAYERS, "layers_pattern": LAYERS_PATTERN}
# What every PEFT config of adapted linear layers has, layer by layer.
TUNER: Mapping[str, Key] = {**BOOKKEEPING, **TARGETS, **LAYER_SUBSET}


@dataclass(frozen=True)
class CheckedConfig:
    """`values`: the keys with allowed values; `bad`: known keys that are missing or have another value."""

    values: Mapping[str, Any]
    bad: frozenset[str]
    faults: tuple[str, ...]


def check_config(
    config: Mapping[str, Any], keys: Mapping[str, Key], file: str = "adapter_config.json"
) -> CheckedConfig:
    """Judge every key of `config`, the content of `file`; nothing is dropped without a fault."""
    faults, bad = [], set()
    for name, value in sorted(config.items()):
        if name not in keys:
            faults.append(
                f"{file}: key {name!r} (value {shown(value)}) is unknown and could change the result; "
                f"known: {', '.join(sorted(keys))}; remove the key if it was never in effect"
            )
        elif not keys[name].check(value):
            bad.add(name)
            faults.append(f"{file}: {name!r} is {shown(value)}; allowed: {keys[name].allowed}")
    for name, key in sorted(keys.items()):
        if key.required and name not in config:
            bad.add(name)
            faults.append(f"{file}: key {name!r} is missing; it must be {key.allowed}")
    values = {name: value for name, value in config.items() if name in keys and name not in bad}
    if isinstance(values.get("target_modules"), str):
        for name in sorted(set(LAYER_SUBSET) & set(values)):
            if values[name] is not None:
                faults.append(
                    f"adapter_config.json: {name!r} is {shown(values[name])} while 'target_modules' is one string; "
                    "PEFT allows it only beside a list of names"
                )
    if values.get("target_modules") == [] and not values.get("target_parameters"):
        faults.append(f"{file}: 'target_modules' is [] and selects nothing; name the modules that the file has")
    if values.get("layers_pattern") and values.get("layers_to_transform") in (None, []):
        faults.append(
            f"adapter_config.json: 'layers_pattern' is {shown(values['layers_pattern'])} without "
            "'layers_to_transform', which PEFT does not allow; say which layers, or remove it"
        )
    return CheckedConfig(values, frozenset(bad), tuple(faults))
