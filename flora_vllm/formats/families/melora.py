"""MELoRA (arXiv 2402.17263) as its authors' code saves it: n small LoRAs, one for each n-th of inputs and outputs.

Output slice i hears of input slice i alone, by `lora_alpha[i] / r[i] · lora_B.<i> @ lora_A.<i>`: a block-diagonal
update of rank Σ r[i] (their PEFT 0.5, `peft/tuners/melora.py::Linear.forward`; `mode` is stored and never looked at).
"""

from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, TUNER, Key, is_number, is_rank
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, Offset, Term

_A, _B = "lora_A.{}.weight", "lora_B.{}.weight"

_RANKS = Key(
    "a list of integers of at least 1, the rank of each slice (the authors' code fails on a rank of 0)",
    lambda value: isinstance(value, list) and bool(value) and all(map(is_rank, value)),
    required=True,
)
_ALPHAS = Key(
    "a list of finite numbers, one for each slice",
    lambda value: isinstance(value, list) and bool(value) and all(map(is_number, value)),
    required=True,
)


def _parts(scope: Scope) -> Mapping[str, Part]:
    ranks = scope.config["r"]
    into, out = (None if size is None else size // len(ranks) for size in (scope.in_features, scope.out_features))
    parts = dict(bias_parts(scope))
    for i, rank in enumerate(ranks):
        parts |= {_A.format(i): Part((rank, into or "I/n")), _B.format(i): Part((out or "O/n", rank))}
    return parts


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    ranks, alphas = module.config["r"], module.config["lora_alpha"]
    if len(alphas) != len(ranks):
        raise AdapterError(
            f"'r' has {len(ranks)} slices and 'lora_alpha' {len(alphas)}; MELoRA has one of each a slice"
        )
    for size, what in ((module.scope.in_features, "in"), (module.scope.out_features, "out")):
        if size is not None and size % len(ranks):
            raise AdapterError(f"its {size} {what} features cannot be cut into {len(ranks)} equal slices")
    down = torch.block_diag(*(module[_A.format(i)] for i in range(len(ranks))))
    scales = (float(alpha / rank) for alpha, rank in zip(alphas, ranks, strict=True))
    up = torch.block_diag(*(module[_B.format(i)].float() * scale for i, scale in enumerate(scales)))
    return (Added(down, up),)


MELORA = Family(
    name="MELORA",
    title="MELoRA",
    keys={
        **TUNER,
        "r": _RANKS,
        "lora_alpha": _ALPHAS,
        "bias": bias_key("lora"),
        # Used only while training, or by nothing.
        **dict.fromkeys(("mode", "lora_dropout", "init_lora_weights"), ANYTHING),
    },
    names=(_A.format("*"), _B.format("*"), *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="rank Σ r at run time",
)
