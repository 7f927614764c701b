"""VB-LoRA (arXiv 2405.15179) as PEFT 0.21 saves it: LoRA whose factors are mixtures of vectors of one bank.

Each stretch of `vector_length` numbers of a factor is a softmax-weighted sum of its `topk` vectors. The file has the
logits of all vectors, or with `save_only_topk_weights` the chosen vectors' numbers and all weights but the last
(`peft/tuners/vblora/layer.py`, `vblora/model.py::_get_adapter_state_dict`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, RANK, TUNER
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import INTEGERS, Config, Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, Offset, Term

LOGITS_A, LOGITS_B, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
CHOSEN, WEIGHTS = "_topk_indices", "_topk_weights"


def _stored(config: Config) -> bool:
    return config.get("save_only_topk_weights") is True


def _parts(scope: Scope) -> Mapping[str, Part]:
    rank, length = scope.config["r"], scope.config["vector_length"]
    if any(size is not None and size % length for size in (scope.in_features, scope.out_features)):
        # No shape is right: every tensor is refused with what the config allows.
        return {}
    into, out = (None if size is None else size // length for size in (scope.in_features, scope.out_features))
    axes = {LOGITS_A: (rank, into), LOGITS_B: (out, rank)}
    if not _stored(scope.config):
        logits = {part: Part((*pair, scope.config["num_vectors"])) for part, pair in axes.items()}
        return {**logits, **bias_parts(scope)}
    topk = scope.config["topk"]
    chosen = {f"{part}{CHOSEN}": Part((*pair, topk), dtypes=INTEGERS) for part, pair in axes.items()}
    weights = {f"{part}{WEIGHTS}": Part((*pair, topk - 1), may_be_empty=topk == 1) for part, pair in axes.items()}
    return {**chosen, **weights, **bias_parts(scope)}


def _mixed(module: ModuleFile, part: str) -> torch.Tensor:
    """The factor before its vectors are strung together: (., ., vector_length)."""
    bank, topk = module.shared[BANK].float(), module.config["topk"]
    if topk > bank.shape[0]:
        raise AdapterError(f"topk is {topk}, of a bank of {bank.shape[0]} vectors")
    if _stored(module.config):
        indices = module[f"{part}{CHOSEN}"].long()
        known = module[f"{part}{WEIGHTS}"].float()
        weights = torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)
        if indices.min() < 0 or indices.max() >= bank.shape[0]:
            raise AdapterError(f"{part}{CHOSEN} names vectors that a bank of {bank.shape[0]} does not have")
        if (indices.sort(-1).values.diff(dim=-1) == 0).any():
            raise AdapterError(f"{part}{CHOSEN} names a vector twice for one place")
    else:
        logits, indices = module[part].float().topk(topk, -1)
        weights = logits.softmax(-1)
    mixed = torch.zeros(*indices.shape[:-1], bank.shape[1])
    for k in range(indices.shape[-1]):
        mixed += weights[..., k, None] * bank[indices[..., k]]
    return mixed


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    down = _mixed(module, LOGITS_A).flatten(1)
    up = _mixed(module, LOGITS_B).transpose(1, 2).flatten(0, 1)
    return (Added(down, up),)


VBLORA = Family(
    name="VBLORA",
    title="VB-LoRA, whole logits or top-k weights only",
    keys={
        **TUNER,
        "r": RANK,
        "num_vectors": RANK,
        "vector_length": RANK,
        "topk": RANK,
        "save_only_topk_weights": BOOLEAN,
        "bias": bias_key("vblora"),
        # Used only while training.
        **dict.fromkeys(("vblora_dropout", "init_vector_bank_bound", "init_logits_std"), ANYTHING),
    },
    names=(*(f"{part}{end}" for part in (LOGITS_A, LOGITS_B) for end in ("", CHOSEN, WEIGHTS)), *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    shared_names=(BANK,),
    shared_parts=lambda config: {BANK: Part((config["num_vectors"], config["vector_length"]))},
    terms=and_biases(_terms),
    kinds=(Added, Offset),
)
