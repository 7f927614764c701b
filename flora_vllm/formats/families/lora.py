"""LoRA as PEFT 0.21 saves it: `W + scale · lora_B @ lora_A`, scale = alpha/r, or alpha/√r with `use_rslora`.

Rank and alpha may differ by module (`rank_pattern`, `alpha_pattern`; `peft/tuners/lora/model.py`). Variants that
compute something else share the file format, so every field of LoraConfig is listed with the values that keep it LoRA;
rows of variants change that list where they read a field themselves.
"""

import math
from collections.abc import Mapping

import torch

from flora_vllm.formats.config_keys import (
    ANYTHING,
    BOOLEAN,
    EXPERT_PARAMETERS,
    MODULES,
    NOTHING,
    NUMBER,
    NUMBER_PATTERN,
    RANK,
    RANK_PATTERN,
    TOKEN_INDICES,
    TUNER,
    Key,
    only,
)
from flora_vllm.formats.families.biases import BIAS_NAMES, bias_key, bias_parts, replaced_bias
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope, pattern_rank
from flora_vllm.terms import Added, Offset, Term

LORA_A, LORA_B, LORA_B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
# Of an embedding E (tokens, width): (rank, tokens) and (width, rank); E + scale · (B A)ᵀ (`lora/layer.py::Embedding`).
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
EMBEDDING_PARTS = {EMBEDDING_A: Part(("R", "O")), EMBEDDING_B: Part(("I", "R"))}
LORA_NAMES = (LORA_A, LORA_B, LORA_B_BIAS, *BIAS_NAMES)
# What the variational sampler and the compressed backward pass of training leave in the file; nothing reads it.
_OF_TRAINING = ("lora_monteclora_sampler.*", "lora_velora_embed")

# Initialisations that leave the base weight as it was. The others change it: what PiSSA and OLoRA took from it is
# found again (lora_starts.py); what CorDA, LoftQ, LoRA-GA and the randomised PiSSA took is in no file.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _leaves_the_base(value: object) -> bool:
    value = value.lower() if isinstance(value, str) else value  # as PEFT compares most of them
    return any(type(value) is type(init) and value == init for init in _INITS)


_INIT = Key(
    f"{' or '.join(map(repr, _INITS))} (pissa and olora too where no variant is on); any other start changed the "
    "base weight in a way that the file does not tell: save it again with PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter as it was before training>)",
    _leaves_the_base,
)

LORA_KEYS: Mapping[str, Key] = {
    **TUNER,
    "r": RANK,
    "rank_pattern": RANK_PATTERN,
    "lora_alpha": NUMBER,
    "alpha_pattern": NUMBER_PATTERN,
    "use_rslora": BOOLEAN,
    "init_lora_weights": _INIT,
    "bias": bias_key("lora"),
    "lora_bias": BOOLEAN,
    # Used only while training, or only by a feature that is off.
    "lora_dropout": ANYTHING,
    "eva_config": ANYTHING,
    # Of starts that `init_lora_weights` names, or named before PEFT converted the file.
    **dict.fromkeys(("corda_config", "loftq_config", "lora_ga_config"), ANYTHING),
    "megatron_core": ANYTHING,
    "qalora_group_size": ANYTHING,
    # Of PEFT 0.2 and 0.3, at the values that switch nothing on.
    "enable_lora": only(None),
    "merge_weights": only(False),
    # Each of these changes what the layer computes, or adapts something that is not a linear layer.
    "use_dora": only(False),
    "use_qalora": only(False),
    "ensure_weight_tying": BOOLEAN,  # where it does something it is refused: module_faults.tying_faults
    "use_bdlora": only(None),
    "arrow_config": NOTHING,
    "kasa_config": NOTHING,
    "layer_replication": NOTHING,
    "megatron_config": NOTHING,
    "monteclora_config": NOTHING,
    "target_parameters": NOTHING,
    "trainable_token_indices": TOKEN_INDICES,
    "velora_config": NOTHING,
}


def lora_parts(scope: Scope) -> Mapping[str, Part]:
    parts = {LORA_A: Part(("R", "I")), LORA_B: Part(("O", "R")), **bias_parts(scope)}
    if scope.config.get("lora_bias"):
        parts[LORA_B_BIAS] = Part(("O",))
    return parts


def lora_scale(scope: Scope, rank: int) -> float:
    """What multiplies lora_B @ lora_A (`peft/tuners/lora/layer.py::update_layer`)."""
    alpha = scope.by_pattern("alpha_pattern", scope.config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if scope.config.get("use_rslora", False) else rank))


def bias_terms(module: ModuleFile, scale: float) -> tuple[Term, ...]:
    """What replaces the base's bias, and what `lora_bias` adds to it."""
    added = (Offset(module[LORA_B_BIAS], scale),) if LORA_B_BIAS in module else ()
    return (*replaced_bias(module), *added)


def low_rank(module: ModuleFile) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(down (R, I), up (O, R), scale), of an embedding (tokens, width), too."""
    if EMBEDDING_A in module:
        down, up = module[EMBEDDING_B].T, module[EMBEDDING_A].T
    else:
        down, up = module[LORA_A], module[LORA_B]
    return down, up, lora_scale(module.scope, down.shape[0])


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    if LORA_A not in module and EMBEDDING_A not in module:
        return bias_terms(module, 1.0)
    down, up, scale = low_rank(module)
    return (Added(down, up, scale), *bias_terms(module, scale))


def _parts(scope: Scope) -> Mapping[str, Part]:
    if scope.present & {EMBEDDING_A, EMBEDDING_B}:
        return EMBEDDING_PARTS
    return {**lora_parts(scope), **{name: Part(None, optional=True) for name in _OF_TRAINING}}


LORA = Family(
    name="LORA",
    title="LoRA, rsLoRA, rank and alpha patterns, biases",
    keys={
        **LORA_KEYS,
        "monteclora_config": ANYTHING,
        "velora_config": ANYTHING,
        "target_modules": Key("null or " + MODULES.allowed, lambda v: v is None or MODULES.check(v), required=True),
        "target_parameters": EXPERT_PARAMETERS,
    },
    names=(*LORA_NAMES, EMBEDDING_A, EMBEDDING_B, *_OF_TRAINING),
    of_embeddings=(EMBEDDING_A, EMBEDDING_B),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    ranks=pattern_rank,
    terms=_terms,
    kinds=(Added, Offset),
    limit="lora",
    by_structure=True,
)
