"""IA3 as PEFT 0.21 saves it: `ia3_l` (1, I) on the input of feed-forward modules, (O, 1) on the output of others.

On the output PEFT scales the bias too, in the forward (the biased result is scaled) and in the merge
(`peft/tuners/ia3/layer.py`); on the input the bias is left alone.
"""

from collections.abc import Mapping

import torch

from flora_vllm.adapter import Gain, Hadamard, ModuleTerms
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, MODULES, TARGETS
from flora_vllm.formats.families.family import Axes, Config, Family
from flora_vllm.formats.matching import is_feedforward

IA3_L = "ia3_l"


def _axes(config: Config, module: str) -> Mapping[str, Axes]:
    if "feedforward_modules" not in config:
        return {}
    return {IA3_L: ("1", "I") if is_feedforward(config["feedforward_modules"], module) else ("O", "1")}


def _terms(config: Config, module: str, parts: Mapping[str, torch.Tensor]) -> ModuleTerms:
    scaling = parts[IA3_L]
    if is_feedforward(config["feedforward_modules"], module):
        return ModuleTerms(hadamard=Hadamard(scaling, None))
    return ModuleTerms(gain=Gain(scaling.flatten(), scales_bias=True))


IA3 = Family(
    name="IA3",
    keys={**BOOKKEEPING, **TARGETS, "feedforward_modules": MODULES, "init_ia3_weights": ANYTHING},
    parts=(IA3_L,),
    axes=_axes,
    ranks=lambda _config, _module: (),
    terms=_terms,
    limit=None,
)
