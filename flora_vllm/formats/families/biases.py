"""Biases that `bias="all"` and `bias="<method>_only"` save beside any method: they replace the base's.

`x.base_layer.bias` is an adapted module's, `x.bias` another's; both stand alone, adapted or not.
"""

from collections.abc import Callable, Mapping

from flora_vllm.formats.config_keys import Key, only
from flora_vllm.formats.families.family import ModuleFile, Part, Scope
from flora_vllm.terms import Offset, Term

BIAS, BASE_BIAS = "bias", "base_layer.bias"
BIAS_NAMES = (BASE_BIAS, BIAS)


def bias_key(method: str) -> Key:
    """The config's `bias`, with PEFT's prefix of the method."""
    return only("none", "all", f"{method}_only")


def bias_parts(scope: Scope) -> Mapping[str, Part]:
    """Empty unless the config says that biases were saved."""
    if scope.config.get("bias", "none") == "none":
        return {}
    return {name: Part(("O",), optional=True) for name in (BIAS, BASE_BIAS)}


def replaced_bias(module: ModuleFile) -> tuple[Term, ...]:
    return tuple(Offset(module[name], replaces=True) for name in (BIAS, BASE_BIAS) if name in module)


def and_biases(own: Callable[[ModuleFile], tuple[Term, ...]]) -> Callable[[ModuleFile], tuple[Term, ...]]:
    """`own` for modules that have more than a bias, and the biases."""

    def terms(module: ModuleFile) -> tuple[Term, ...]:
        adapted = own(module) if set(module.tensors) - set(BIAS_NAMES) else ()
        return (*adapted, *replaced_bias(module))

    return terms
