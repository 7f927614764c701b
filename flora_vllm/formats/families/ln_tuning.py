"""LN tuning (arXiv 2312.11420) as PEFT 0.21 saves it: norms with weights of their own in the base's place.

A norm is `weight ∘ x̂ + bias`, x̂ its input normed: terms are read with x̂ in the place of the products `W x`.
"""

from collections.abc import Mapping

import torch

from flora_vllm.formats.config_keys import BOOKKEEPING, OPTIONAL_MODULES, TARGETS
from flora_vllm.formats.families.family import Family, Part, Scope
from flora_vllm.terms import Offset, Product, Term

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def norm_terms(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Term, ...]:
    """A norm with these (O,) in place of the base's."""
    return (Product(output=weight[:, None]), *(() if bias is None else (Offset(bias),)))


def _parts(_scope: Scope) -> Mapping[str, Part]:
    return {WEIGHT: Part(("O",)), BIAS: Part(("O",), optional=True)}


LN_TUNING = Family(
    name="LN_TUNING",
    title="LN tuning",
    keys={
        **BOOKKEEPING,
        "target_modules": OPTIONAL_MODULES,
        "exclude_modules": OPTIONAL_MODULES,
        "modules_to_save": TARGETS["modules_to_save"],
    },
    names=(WEIGHT, BIAS),
    of_norms=True,
    parts=_parts,
    terms=lambda module: norm_terms(module[WEIGHT], module.get(BIAS)),
    kinds=(Product, Offset),
    note="with `--flora-norms` or `--enforce-eager`",
)
