"""The families we read: one row each. A new family is a file beside this one and a row here.

Rows of one `peft_type` are tried in order: the first whose flags are on is the one.
"""

from collections.abc import Mapping
from typing import Any

from flora_vllm.formats.families.beft import BEFT
from flora_vllm.formats.families.boft import BOFT
from flora_vllm.formats.families.dora import DORA
from flora_vllm.formats.families.family import Family
from flora_vllm.formats.families.flora import FLORA
from flora_vllm.formats.families.glora import GLORA
from flora_vllm.formats.families.hira import HIRA
from flora_vllm.formats.families.ia3 import IA3
from flora_vllm.formats.families.lora import LORA
from flora_vllm.formats.families.oft import OFT, OFT_NEUMANN
from flora_vllm.formats.families.road import ROAD

# fmt: off
ROWS = (
    # this project's, and plain LoRA with its variants
    FLORA, DORA, LORA,
    # gains and biases
    IA3, HIRA, GLORA, BEFT,
    # rotations
    OFT_NEUMANN, OFT, BOFT, ROAD,
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
