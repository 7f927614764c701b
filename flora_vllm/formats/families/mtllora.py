"""MTL-LoRA (arXiv 2410.09437): per task one LoRA, `alpha/r · [σ(scaler)] · B_t Λ_t A`, B_t a mixture of B's.

`B_t = Σ_j softmax(lora_B_w[t] / temperature)_j · lora_B[j]`; Λ_t is a matrix or the diagonal of one. The authors save a
pickled state dict and no config (`final_checkpoint.pt`; `src/adapter/mlora.py::mLoRALinear`); `flora-vllm convert`
makes it the directory that is read here: their tensors under PEFT's prefix, what the shapes tell in
adapter_config.json, and in flora_sidecar.json the two numbers of the training script's command line that change the
result, `alpha` (lora_alpha) and `temperature` (B_scale).
"""

from collections.abc import Mapping

import torch

from flora_vllm.formats.config_keys import BOOKKEEPING, MAX_TASKS, NUMBER, RANK, TARGETS, Key, integer, is_number
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope, tasks_known
from flora_vllm.terms import Added, Term

LORA_A, LAMBDAS, LORA_B, WEIGHTS, SCALER = "lora_A", "lora_lambdas", "lora_B", "lora_B_w", "lora_scaler"


def _parts(scope: Scope) -> Mapping[str, Part]:
    rank, tasks = scope.config["r"], scope.config["n_tasks"]
    diagonal = bool(scope.config.get("diagonal", False))
    return {
        LORA_A: Part((1, rank, "I")),
        LAMBDAS: Part((tasks, rank) if diagonal else (tasks, rank, rank)),
        LORA_B: Part(("number of B's", "O", rank)),
        WEIGHTS: Part((tasks, "number of B's")),
        SCALER: Part((), optional=True),
    }


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    assert module.scope.task is not None, "the reader asks for a task"
    task, config = int(module.scope.task), module.config
    b = module[LORA_B]
    # In float32, then rounded to the dtype of what it mixes, as the authors do.
    weights = torch.softmax(module[WEIGHTS][task].float() / config["temperature"], -1).to(b.dtype)
    up = torch.einsum("j,jor->or", weights.float(), b.float())
    core = module[LAMBDAS][task].float()
    scale = config["alpha"] / config["r"]
    if SCALER in module:
        scale *= float(torch.sigmoid(module[SCALER].float()))
    return (Added(module[LORA_A][0], up * core if core.ndim == 1 else up @ core, scale),)


MTLLORA = Family(
    name="MTLLORA",
    title="MTL-LoRA, one task of a file",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        "r": RANK,
        "n_tasks": integer(1, MAX_TASKS, required=True),
        "diagonal": Key("true or false", lambda value: isinstance(value, bool), required=True),
    },
    sidecar_keys={
        "alpha": NUMBER,
        "temperature": Key("a number above 0", lambda value: is_number(value) and value > 0, required=True),
    },
    names=(LORA_A, LAMBDAS, LORA_B, WEIGHTS, SCALER),
    parts=_parts,
    terms=_terms,
    kinds=(Added,),
    tasks=lambda config: tasks_known(config, "n_tasks"),
    note="`path#task`; converted from its checkpoint",
)
