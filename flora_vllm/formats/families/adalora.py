"""AdaLoRA (arXiv 2303.10512) as PEFT 0.21 saves it: `W + alpha / (init_r + 1e-5) · B diag(E) A`.

Ranks differ by module once training has pruned them, down to none; the divisor stays that of the rank at the start
(`peft/tuners/adalora/layer.py::get_delta_weight`, `ranknum` in `adalora/model.py`).
"""

from collections.abc import Mapping

from flora_vllm.formats.config_keys import ANYTHING, NUMBER, RANK, Key
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.lora import LORA_KEYS
from flora_vllm.terms import Added, Offset, Term

# Parameters of a ParameterDict, hence no `.weight`.
LORA_A, LORA_B, LORA_E = "lora_A", "lora_B", "lora_E"


def _parts(scope: Scope) -> Mapping[str, Part]:
    rank = "R" if scope.config.get("rank_pattern") else scope.config["init_r"]  # nothing was pruned
    return {
        LORA_A: Part((rank, "I"), may_be_empty=True),
        LORA_B: Part(("O", rank), may_be_empty=True),
        LORA_E: Part((rank, 1), may_be_empty=True),
        **bias_parts(scope),
    }


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    down, up, sizes = module[LORA_A], module[LORA_B], module[LORA_E]
    if not down.shape[0]:
        return ()
    alpha, start = module.config["lora_alpha"], module.config["init_r"]
    scale = (alpha if alpha > 0 else float(start)) / (start + 1e-5)
    return (Added(down, up, scale, mid=sizes[:, 0]),)


ADALORA = Family(
    name="ADALORA",
    title="AdaLoRA",
    keys={
        **LORA_KEYS,
        "init_r": RANK,
        "lora_alpha": NUMBER,
        # Which ranks were kept; the tensors are already cut to them.
        "rank_pattern": Key("null or an object", lambda value: value is None or isinstance(value, dict)),
        # LoRA's, which AdaLoRA's layers do not look at.
        **dict.fromkeys(("r", "alpha_pattern", "use_rslora", "init_lora_weights", "lora_bias"), ANYTHING),
        # Used only while training.
        **dict.fromkeys(
            ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"), ANYTHING
        ),
    },
    names=(LORA_A, LORA_B, LORA_E, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    rank_key="init_r",
)
