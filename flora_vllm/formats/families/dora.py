"""DoRA (arXiv 2402.09353) as PEFT 0.21 saves it: `m / ‖W + s B A‖ ∘ (W + s B A)` by rows, the bias left alone.

The norms are of the served base, quantised or not: ‖W_o + s B_o A‖² = ‖W_o‖² + 2 s B_o·(W Aᵀ)_o + s² B_o (A Aᵀ) B_oᵀ
needs the base's product with the R rows of A and its row norms, never W itself (`peft/tuners/lora/dora.py`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flora_vllm.formats.config_keys import only
from flora_vllm.formats.families.family import ModuleFile, Part, Scope
from flora_vllm.formats.families.lora import LORA, LORA_A, LORA_KEYS, LORA_NAMES, bias_terms, lora_parts, low_rank
from flora_vllm.terms import Added, FromBase, Gain, Offset, Probe, Term

MAGNITUDE = "lora_magnitude_vector"


def _parts(scope: Scope) -> Mapping[str, Part]:
    return {**lora_parts(scope), MAGNITUDE: Part(("O",))}


def squared_norms(probe: Probe, down_RI: torch.Tensor, up_OR: torch.Tensor) -> torch.Tensor:
    """‖W_o + up_o · down‖² of each output: (O,) float32."""
    down, up = down_RI.float(), up_OR.float()
    cross_O = (probe.product(down).T * up).sum(1)
    own_O = ((up @ (down @ down.T)) * up).sum(1)
    return probe.squared_row_norms() + 2 * cross_O + own_O


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    if LORA_A not in module:
        return bias_terms(module, 1.0)
    down, up, scale = low_rank(module)
    magnitude = module[MAGNITUDE]

    def build(probe: Probe) -> tuple[Term, ...]:
        norms = squared_norms(probe, down, up.float() * scale).sqrt()
        return Added(down, up, scale), Gain(magnitude.float() / norms, scales_bias=False)

    shape = (up.shape[0], down.shape[1])
    return (FromBase(build, (down, up, magnitude), down.shape[0], shape), *bias_terms(module, scale))


DORA = replace(
    LORA,
    by_structure=False,
    name="DORA",
    title="DoRA",
    peft_type="LORA",
    when=lambda config: config.get("use_dora") is True,
    keys={**LORA_KEYS, "use_dora": only(True), "lora_bias": only(False)},
    names=(*LORA_NAMES, MAGNITUDE),
    parts=_parts,
    terms=_terms,
    kinds=(Added, Gain, Offset),
    note="also on quantised bases",
)
