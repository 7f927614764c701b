"""SuperTuning as PEFT 0.21 saves it: `supertuning_values` at places of the flat weight, and beside them maybe LoRA.

Without `save_precomputed_indices` the places are those of the base's largest (or smallest) weights in the order of
topk (`peft/tuners/supertuning/layer.py::update_layer`), which ties and another dtype change: such files are refused.
"""

from collections.abc import Mapping
from dataclasses import replace

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, BOOLEAN, TARGETS, Key, is_number, is_rank, only
from flora_vllm.formats.families.family import INTEGERS, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import sides
from flora_vllm.terms import Added, FromBase, Probe, Sparse, Term

VALUES, INDICES = "supertuning_values", "supertuning_indices"
LORA_A, LORA_B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def _parts(scope: Scope) -> Mapping[str, Part]:
    count: int | str = "n"
    if scope.out_features is not None and scope.in_features is not None:
        count = int(scope.out_features * scope.in_features * (1 - scope.config.get("sparsity", 0.99)))
    parts = {VALUES: Part((count,)), INDICES: Part((count,), dtypes=INTEGERS)}
    if scope.config.get("r") is not None:
        parts |= {LORA_A: Part(("R", "I")), LORA_B: Part(("O", "R"))}
    return parts


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    values, places, config = module[VALUES], module[INDICES], module.config
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is None and alpha is not None:
        raise AdapterError("lora_alpha is set and r is null: PEFT refuses that; remove lora_alpha, or give r")

    def build(probe: Probe) -> tuple[Term, ...]:
        shape, flat = sides(probe), places.long()
        return (Sparse(values, flat // shape[1], flat % shape[1], shape),)

    sparse = FromBase(build, (values, places), dense_bytes=12 * len(values))
    if LORA_A not in module:
        return (sparse,)
    return sparse, Added(module[LORA_A], module[LORA_B], 2.0 if alpha is None else alpha / rank)


SUPERTUNING = Family(
    name="SUPERTUNING",
    title="SuperTuning, alone and with LoRA",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        "r": Key("null or an integer of at least 1", lambda value: value is None or is_rank(value)),
        "lora_alpha": Key("null or a finite number", lambda value: value is None or is_number(value)),
        "select_top": BOOLEAN,  # what the saved places came of
        "save_precomputed_indices": replace(
            only(True),
            allowed="True, for rounding and equal weights reorder places that a file leaves out; load it with PEFT and "
            "this key true on the very base that it was trained on, dtype included, and save it again",
        ),
        "sparsity": Key("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
        # Used only while training.
        "lora_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(VALUES, INDICES, LORA_A, LORA_B),
    parts=_parts,
    ranks=lambda scope: (scope.config["r"],) if scope.config.get("r") is not None else (),
    terms=_terms,
    kinds=(Sparse, Added),
    limit="lora",
    note="places in the file",
)
