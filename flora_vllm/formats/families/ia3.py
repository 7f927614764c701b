"""IA3 as PEFT 0.21 saves it: `ia3_l` (1, I) on the input of feed-forward modules, (O, 1) on the output of others.

On the output PEFT scales the bias too, in the forward (the biased result is scaled) and in the merge
(`peft/tuners/ia3/layer.py`); on the input the bias is left alone.
"""

from collections.abc import Mapping

from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, MODULES, TARGETS
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.formats.matching import is_feedforward
from flora_vllm.terms import Gain, Product, Term

IA3_L = "ia3_l"


def _scales_input(scope: Scope) -> bool:
    return is_feedforward(scope.config["feedforward_modules"], scope.module)


def _parts(scope: Scope) -> Mapping[str, Part]:
    if "feedforward_modules" not in scope.config:
        return {}
    return {IA3_L: Part((1, "I") if _scales_input(scope) else ("O", 1))}


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    scaling = module[IA3_L]
    return (Product(input=scaling) if _scales_input(module.scope) else Gain(scaling.flatten(), scales_bias=True),)


IA3 = Family(
    name="IA3",
    title="IA3, attention and feed-forward",
    keys={**BOOKKEEPING, **TARGETS, "feedforward_modules": MODULES, "init_ia3_weights": ANYTHING},
    names=(IA3_L,),
    parts=_parts,
    terms=_terms,
    kinds=(Product, Gain),
)
