"""The families we read: one row each. A new family is a file beside this one and a row here.

Rows of one `peft_type` are tried in order: the first whose flags are on is the one.
"""

from collections.abc import Mapping
from typing import Any

from flora_vllm.formats.families.adalora import ADALORA
from flora_vllm.formats.families.adamss import ADAMSS
from flora_vllm.formats.families.beft import BEFT
from flora_vllm.formats.families.boft import BOFT
from flora_vllm.formats.families.c3a import C3A
from flora_vllm.formats.families.deft import DEFT
from flora_vllm.formats.families.delora import DELORA
from flora_vllm.formats.families.dora import DORA
from flora_vllm.formats.families.family import Family
from flora_vllm.formats.families.flora import FLORA
from flora_vllm.formats.families.fourierft import FOURIERFT
from flora_vllm.formats.families.frod import FROD
from flora_vllm.formats.families.gated import ARROW, METEORA
from flora_vllm.formats.families.glora import GLORA
from flora_vllm.formats.families.gralora import GRALORA
from flora_vllm.formats.families.hira import HIRA
from flora_vllm.formats.families.hra import HRA
from flora_vllm.formats.families.ia3 import IA3
from flora_vllm.formats.families.ln_tuning import LN_TUNING
from flora_vllm.formats.families.loha import LOHA
from flora_vllm.formats.families.lokr import LOKR
from flora_vllm.formats.families.lora import LORA
from flora_vllm.formats.families.lora_blocks import BDLORA, QALORA
from flora_vllm.formats.families.lora_starts import KASA, OLORA, PISSA
from flora_vllm.formats.families.melora import MELORA
from flora_vllm.formats.families.miss import BONE, MISS
from flora_vllm.formats.families.mixlora import MIXLORA
from flora_vllm.formats.families.mtllora import MTLLORA
from flora_vllm.formats.families.oft import OFT, OFT_NEUMANN
from flora_vllm.formats.families.osf import OSF
from flora_vllm.formats.families.peanut import PEANUT
from flora_vllm.formats.families.poly import POLY
from flora_vllm.formats.families.psoft import PSOFT
from flora_vllm.formats.families.randlora import RANDLORA, RANDLORA_DRAWN
from flora_vllm.formats.families.road import ROAD
from flora_vllm.formats.families.shira import SHIRA
from flora_vllm.formats.families.supertuning import SUPERTUNING
from flora_vllm.formats.families.tinylora import TINYLORA
from flora_vllm.formats.families.trainable_tokens import TRAINABLE_TOKENS
from flora_vllm.formats.families.unilora import UNILORA
from flora_vllm.formats.families.vblora import VBLORA
from flora_vllm.formats.families.vera import PVERA, VERA
from flora_vllm.formats.families.waveft import WAVEFT
from flora_vllm.formats.families.xgblora import XGBLORA

# fmt: off
ROWS = (
    # this project's, and plain LoRA with its variants; the plain row takes what the others leave
    FLORA, DORA, PISSA, OLORA, KASA, BDLORA, QALORA, LORA,
    # low rank once loaded
    ADALORA, LOHA, VBLORA, UNILORA, MISS, BONE, GRALORA, DELORA, POLY,
    # the same, of systems outside PEFT
    MELORA, MTLLORA, XGBLORA,
    # low rank, chosen by token
    ARROW, METEORA, MIXLORA,
    # low rank once the base was asked
    PEANUT, HRA, DEFT, PSOFT, OSF, ADAMSS,
    # gains and biases
    IA3, HIRA, GLORA, BEFT,
    # rotations
    OFT_NEUMANN, OFT, BOFT, ROAD,
    # bases shared by all adapters
    VERA, PVERA, RANDLORA_DRAWN, RANDLORA, TINYLORA, FOURIERFT, WAVEFT,
    # structured, sparse and dense matrices
    LOKR, C3A, SHIRA, SUPERTUNING, FROD,
    # weights in place of the base's
    TRAINABLE_TOKENS, LN_TUNING,
)
# fmt: on
FAMILIES: Mapping[str, Family] = {family.name: family for family in ROWS}

# What no row reads, and why; a family that is in neither list is refused without a reason.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "CPT",
            "ADAPTION_PROMPT",
            "CARTRIDGE",
        ),
        "it changes the prompt or the key-value cache, not the weights",
    ),
    "LILY": "its output for a token depends on the other requests in the batch",
    "XLORA": "it needs a second pass of the whole model for every step",
    "SHADOW": "it runs a model of its own beside the base",
}

# The mark of its tensors, and its name in the tables.
CONDITIONAL_MARK, CONDITIONAL = "cmoa_", "conditional MixLoRA (VT-NLP)"
# Variants that a config or a tensor names and no row reads: README's words for them.
REFUSED_VARIANTS: Mapping[str, str] = {
    CONDITIONAL: "its routers read the mean over all tokens of one call, so that its output depends on how an engine "
    "cuts a prompt into steps (chunked prefill, cached prefixes, a preempted request's second prefill)",
    **dict.fromkeys(
        ("CorDA", "LoRA-GA", "LoftQ", "PiSSA with `pissa_niter_*`"),
        "training changed the base in a way that no file tells; PEFT saves it as LoRA with "
        "`path_initial_model_for_weight_conversion`",
    ),
}


def family_of(config: Mapping[str, Any]) -> tuple[str | None, Family | None]:
    """The family's name as the config has it, and its row if there is one."""
    name = config.get("peft_type")
    if not isinstance(name, str):
        return None, None
    for family in ROWS:
        if family.type_name == name and family.when(config):
            return family.name, family
    return name, None
