"""The families we read: name -> how. A new family is a file beside this one and a row here."""

from collections.abc import Mapping

from flora_vllm.formats.families.family import Family
from flora_vllm.formats.families.flora import FLORA
from flora_vllm.formats.families.hira import HIRA
from flora_vllm.formats.families.ia3 import IA3
from flora_vllm.formats.families.lora import LORA

FAMILIES: Mapping[str, Family] = {family.name: family for family in (FLORA, HIRA, IA3, LORA)}
