"""XGBLoRA (arXiv 2410.19694): boosters of tiny rank, each fitted to what the earlier ones left, `W + Σ_t B_t A_t`.

Nothing public is saved per booster (they are merged as they come), so this layout is ours. A directory holds

    adapter_config.json        peft_type "XGBLORA", target_modules, `r` (rank of a booster), `n_boosters` (how many);
                               there is no alpha: the sum is taken as it is
    adapter_model.safetensors  base_model.model.<module>.booster_A (R, I), base_model.model.<module>.booster_B (O, R)

with the boosters of a module stacked in any order, r rows of `booster_A` and r columns of `booster_B` each. A booster
adapts only some layers, so a module has R = r · (how many chose it), at most r · n_boosters. The equation is the
paper's; there is no code of its authors' to check it against.
"""

from collections.abc import Mapping

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import BOOKKEEPING, RANK, TARGETS
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, Term

BOOSTER_A, BOOSTER_B = "booster_A", "booster_B"


def _parts(_scope: Scope) -> Mapping[str, Part]:
    # Any rank: R has no values, so the two only have to agree.
    return {BOOSTER_A: Part(("R", "I")), BOOSTER_B: Part(("O", "R"))}


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    down, up = module[BOOSTER_A], module[BOOSTER_B]
    rank, most = module.config["r"], module.config["n_boosters"]
    if len(down) % rank or len(down) > rank * most:
        raise AdapterError(
            f"its stacked boosters have rank {len(down)}; of {most} boosters of rank {rank} it is a multiple of "
            f"{rank} and at most {rank * most}"
        )
    return (Added(down, up),)


XGBLORA = Family(
    name="XGBLORA",
    title="XGBLoRA, boosters stacked",
    keys={**BOOKKEEPING, **TARGETS, "r": RANK, "n_boosters": RANK},
    names=(BOOSTER_A, BOOSTER_B),
    parts=_parts,
    terms=_terms,
    kinds=(Added,),
    limit="lora",
    note="our layout: `formats/families/xgblora.py`",
)
