"""Poly (arXiv 2202.13914, 2211.03831) as PEFT 0.21 saves it: per task a mixture of skills, which is one LoRA.

Each of `n_splits` stretches of inputs and outputs mixes its own `n_skills` pairs of factors with the task's weights,
`σ(logits) / Σ σ(logits)`; the result is divided by r (`peft/tuners/poly/layer.py`, `poly/router.py`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, MAX_TASKS, RANK, TARGETS, integer, only
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope, tasks_known
from flora_vllm.terms import Added, Term

POLY_A, POLY_B, ROUTER = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
# PEFT's, in the divisor of the weights.
_EPSILON = 1e-12


def _parts(scope: Scope) -> Mapping[str, Part]:
    splits, skills, rank, tasks = (scope.config[key] for key in ("n_splits", "n_skills", "r", "n_tasks"))
    into, out = (None if size is None else size // splits for size in (scope.in_features, scope.out_features))
    return {
        POLY_A: Part((splits, skills, into, rank)),
        POLY_B: Part((splits, skills, rank, out)),
        ROUTER: Part((tasks, splits * skills)),
    }


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    assert module.scope.task is not None, "the reader asks for a task"
    a, b = module[POLY_A].float(), module[POLY_B].float()
    splits, skills, _, rank = a.shape
    weights = torch.sigmoid(module[ROUTER][int(module.scope.task)].float()).view(splits, skills)
    weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
    down = torch.einsum("qs,qsdr->rqd", weights, a).flatten(1)
    up = torch.einsum("qs,qsrd->qdr", weights, b).flatten(0, 1)
    return (Added(down, up, 1 / rank),)


POLY = Family(
    name="POLY",
    title="Poly and MHR, one task of a file",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        **dict.fromkeys(("r", "n_skills", "n_splits"), RANK),
        "n_tasks": integer(1, MAX_TASKS, required=True),
        "poly_type": only("poly"),
        "init_weights": ANYTHING,  # used only while training
    },
    names=(POLY_A, POLY_B, ROUTER),
    parts=_parts,
    terms=_terms,
    kinds=(Added,),
    tasks=lambda config: tasks_known(config, "n_tasks"),
    note="`path#task`",
)
