"""DoRA (arXiv 2402.09353) as PEFT 0.21 saves it: `m / ‖W + s B A‖ ∘ (W + s B A)` by rows, the bias left alone.

The norms are of the served base, quantised or not: ‖W_o + s B_o A‖² = ‖W_o‖² + 2 s B_o·(W Aᵀ)_o + s² B_o (A Aᵀ) B_oᵀ
needs the base's product with the R rows of A and its row norms, never W itself (`peft/tuners/lora/dora.py`). Of an
embedding E (tokens, width) it is `(E + s (B A)ᵀ) ∘ m / ‖E + s (B A)ᵀ‖` by columns, one for each of the width.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import only
from flora_vllm.formats.families.family import ModuleFile, Part, Scope
from flora_vllm.formats.families.lora import (
    EMBEDDING_A,
    EMBEDDING_B,
    EMBEDDING_PARTS,
    LORA,
    LORA_A,
    LORA_KEYS,
    LORA_NAMES,
    bias_terms,
    lora_parts,
    low_rank,
)
from flora_vllm.pacing import pace
from flora_vllm.terms import Added, FromBase, Gain, Offset, Probe, Product, Term

MAGNITUDE = "lora_magnitude_vector"
_COLUMNS = 64  # of W (O, I) asked for at once: of an embedding they are as long as the vocabulary


def _parts(scope: Scope) -> Mapping[str, Part]:
    if scope.present & {EMBEDDING_A, EMBEDDING_B}:
        return {**EMBEDDING_PARTS, MAGNITUDE: Part(("I",))}
    return {**lora_parts(scope), MAGNITUDE: Part(("O",))}


def squared_norms(probe: Probe, down_RI: torch.Tensor, up_OR: torch.Tensor) -> torch.Tensor:
    """‖W_o + up_o · down‖² of each output: (O,) float32."""
    down, up = down_RI.float(), up_OR.float()
    cross_O = (probe.product(down).T * up).sum(1)
    own_O = ((up @ (down @ down.T)) * up).sum(1)
    return _in_range(probe.squared_row_norms() + 2 * cross_O + own_O)


def squared_column_norms(probe: Probe, down_RI: torch.Tensor, up_OR: torch.Tensor) -> torch.Tensor:
    """‖W_i + up · down_i‖² of each input: (I,) float32."""
    sums = []
    for unit_NI in torch.eye(probe.shape[1]).split(_COLUMNS):
        pace()
        column_NO = probe.product(unit_NI)  # W's columns, as rows
        sums.append((column_NO + unit_NI @ down_RI.float().T @ up_OR.float().T).square().sum(1))
    return _in_range(torch.cat(sums))


def _in_range(squares: torch.Tensor) -> torch.Tensor:
    """A norm that is infinite would make nothing of its weights, without a trace."""
    if not squares.isfinite().all():
        raise AdapterError("the norms of W + s B A leave the range of float32; look at lora_alpha and the factors")
    return squares


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    if LORA_A not in module and EMBEDDING_A not in module:
        return bias_terms(module, 1.0)
    down, up, scale = low_rank(module)
    magnitude = module[MAGNITUDE]

    def build(probe: Probe) -> tuple[Term, ...]:
        if EMBEDDING_A in module:
            gain_I = magnitude.float() / squared_column_norms(probe, down, up.float() * scale).sqrt()
            return Product(input=gain_I[None]), Added(down.float() * gain_I, up, scale)
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
    names=(*LORA_NAMES, EMBEDDING_A, EMBEDDING_B, MAGNITUDE),
    parts=_parts,
    terms=_terms,
    kinds=(Added, Gain, Offset, Product),
    note="also on quantised bases",
)
