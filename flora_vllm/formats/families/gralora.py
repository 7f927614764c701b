"""GraLoRA (arXiv 2505.20355) as PEFT 0.21 saves it: k × k blocks of low rank r/k each.

Output block j hears of input block n through `A[n][:, j·r/k : (j+1)·r/k]` and `B[j][n·r/k : (n+1)·r/k]`; all together
that is one low-rank update of rank k·r, beside it a plain one of rank `hybrid_r`
(`peft/tuners/gralora/layer.py::get_delta_weight`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, NUMBER, RANK, TUNER, Key
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, Offset, Term

GRALORA_A, GRALORA_B = "gralora_A", "gralora_B"
GENERAL_A, GENERAL_B = "gralora_A_general.weight", "gralora_B_general.weight"


def _parts(scope: Scope) -> Mapping[str, Part]:
    blocks, rank, beside = (scope.config[key] for key in ("gralora_k", "r", "hybrid_r"))
    into, out = (None if size is None else size // blocks for size in (scope.in_features, scope.out_features))
    parts = {GRALORA_A: Part((blocks, into, rank)), GRALORA_B: Part((blocks, rank, out)), **bias_parts(scope)}
    if beside:
        parts |= {GENERAL_A: Part((beside, "I")), GENERAL_B: Part(("O", beside))}
    return parts


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    a, b = module[GRALORA_A], module[GRALORA_B]
    blocks, into, rank = a.shape
    out = b.shape[2]
    if rank % blocks:
        raise AdapterError(f"rank {rank} cannot be shared by {blocks} blocks")
    # Rank (n, j): from input block n to output block j, rank/blocks of them.
    down = torch.zeros(blocks, blocks, rank // blocks, blocks, into, dtype=a.dtype)
    up = torch.zeros(blocks, out, blocks, blocks, rank // blocks, dtype=b.dtype)
    for n in range(blocks):
        down[n, :, :, n] = a[n].T.reshape(blocks, rank // blocks, into)
    for j in range(blocks):
        up[j, :, :, j] = b[j].T.reshape(out, blocks, rank // blocks)
    scale = module.config["alpha"] / (rank + module.config["hybrid_r"])
    own = Added(down.reshape(blocks * rank, blocks * into), up.reshape(blocks * out, blocks * rank), scale)
    return (own, Added(module[GENERAL_A], module[GENERAL_B], scale)) if GENERAL_A in module else (own,)


GRALORA = Family(
    name="GRALORA",
    title="GraLoRA, hybrid too",
    keys={
        **TUNER,
        "r": RANK,
        "gralora_k": RANK,
        "hybrid_r": Key("an integer of at least 0", lambda value: type(value) is int and value >= 0, required=True),
        "alpha": NUMBER,
        "bias": bias_key("gralora"),
        # Used only while training.
        **dict.fromkeys(("gralora_dropout", "init_weights"), ANYTHING),
    },
    names=(GRALORA_A, GRALORA_B, GENERAL_A, GENERAL_B, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="rank k·r at run time",
)
