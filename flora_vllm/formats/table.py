"""The families we read: name -> how. A new family is a file beside this one and a row here."""

from collections.abc import Mapping

from flora_vllm.formats.family import Family
from flora_vllm.formats.flora import FLORA
from flora_vllm.formats.hira import HIRA
from flora_vllm.formats.ia3 import IA3
from flora_vllm.formats.lora import LORA

FAMILIES: Mapping[str, Family] = {family.name: family for family in (FLORA, HIRA, IA3, LORA)}
