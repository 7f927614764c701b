"""BEFT as PEFT 0.21 saves it: `beft_bias` (1, O) is added to the output (`peft/tuners/beft/layer.py`)."""

from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, TARGETS
from flora_vllm.formats.families.family import Family, Part
from flora_vllm.terms import Offset

BEFT_BIAS = "beft_bias"

BEFT = Family(
    name="BEFT",
    title="BEFT",
    keys={**BOOKKEEPING, **TARGETS, "init_weights": ANYTHING},
    names=(BEFT_BIAS,),
    parts=lambda _scope: {BEFT_BIAS: Part((1, "O"))},
    terms=lambda module: (Offset(module[BEFT_BIAS][0]),),
    kinds=(Offset,),
)
