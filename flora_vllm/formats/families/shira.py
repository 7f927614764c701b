"""SHiRA (arXiv 2406.13175) as PEFT 0.21 saves it: `shira_weight` (n,) at the places `shira_indices` (2, n).

The places are always in the file, whatever mask chose them; saved on Windows they are float32
(`peft/tuners/shira/layer.py`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, RANK, TARGETS
from flora_vllm.formats.families.family import INTEGERS, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import sides
from flora_vllm.terms import FromBase, Probe, Sparse, Term

WEIGHT, INDICES = "shira_weight", "shira_indices"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    values, places = module[WEIGHT], module[INDICES]
    whole = places.long()
    if not torch.equal(whole.to(places.dtype), places):
        raise AdapterError(f"{INDICES!r} has values that are no integers")
    scope = module.scope
    if scope.out_features is not None and scope.in_features is not None:
        return (Sparse(values, whole[0], whole[1], (scope.out_features, scope.in_features)),)

    def build(probe: Probe) -> tuple[Term, ...]:
        return (Sparse(values, whole[0], whole[1], sides(probe)),)

    return (FromBase(build, (values, whole), dense_bytes=12 * len(values)),)


def _parts(scope: Scope) -> Mapping[str, Part]:
    count: int | str = "n"
    if scope.out_features is not None and scope.in_features is not None:
        count = scope.config["r"] * (scope.out_features + scope.in_features)  # as PEFT counts places
    return {WEIGHT: Part((count,)), INDICES: Part((2, count), dtypes=(*INTEGERS, "F32"))}


SHIRA = Family(
    name="SHIRA",
    title="SHiRA, any mask",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        "r": RANK,
        "mask_type": ANYTHING,
        "random_seed": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(WEIGHT, INDICES),
    parts=_parts,
    terms=_terms,
    kinds=(Sparse,),
)
