"""LoRAs among which every token chooses, layer by layer: Arrow (arXiv 2405.11157) and MeteoRA (arXiv 2405.13053).

Both: `y += Σ_e c_e(x) · s_e B_e A_e x`, c = softmax(score / temperature) over a token's `top_k` largest scores.
Arrow: score = |prototype_e · x| (`peft/tuners/lora/arrow.py`). PEFT saves no such adapter; the layout is ours, written
by `flora-vllm merge --method arrow` from plain LoRAs: prototypes and factors stacked, scales in B.
MeteoRA: score = G x with a trained G. The tensors are its authors', whose model files hold them beside the base
(`flora-vllm convert --repair` takes them out); what their scripts pass by hand is in flora_sidecar.json: `alphas` (one
an adapter, in the stacked order), `top_k` (2) and `temperature` (1). Where their code (NJUDeepEngine/meteora) rounds c
to the dtype of x, it stays float32 here.
"""

from collections.abc import Callable, Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import BOOKKEEPING, RANK, TARGETS, Key, is_number
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.lora import LORA_A, LORA_B
from flora_vllm.terms import Gated, Term

PROTOTYPES, GATE = "arrow_prototypes", "moe_gate.weight"
_TEMPERATURE = Key("a number above 0", lambda value: is_number(value) and value > 0, required=True)
_ALPHAS = Key(
    "a list of finite numbers, one for each adapter",
    lambda value: isinstance(value, list) and all(map(is_number, value)),
    required=True,
)


def _parts_with(gate: str) -> Callable[[Scope], Mapping[str, Part]]:
    def parts(scope: Scope) -> Mapping[str, Part]:
        stacked = scope.config["n_adapters"] * scope.config["r"]
        return {
            gate: Part((scope.config["n_adapters"], "I")),
            LORA_A: Part((stacked, "I")),
            LORA_B: Part(("O", stacked)),
        }

    return parts


def _arrow(module: ModuleFile) -> tuple[Term, ...]:
    config = module.config
    gate, down, up = (module[part] for part in (PROTOTYPES, LORA_A, LORA_B))
    return (Gated(gate, down, up, config["top_k"], config["temperature"], is_absolute=True),)


def _meteora(module: ModuleFile) -> tuple[Term, ...]:
    config = module.config
    if len(config["alphas"]) != config["n_adapters"]:
        raise AdapterError(f"'alphas' has {len(config['alphas'])} numbers; there are {config['n_adapters']} adapters")
    scales = torch.tensor([alpha / config["r"] for alpha in config["alphas"]])
    up = module[LORA_B].float() * scales.repeat_interleave(config["r"])
    return (Gated(module[GATE], module[LORA_A], up, config["top_k"], config["temperature"]),)


_KEYS = {**BOOKKEEPING, **TARGETS, "r": RANK, "n_adapters": RANK}
_OF_GATE = {"top_k": RANK, "temperature": _TEMPERATURE}

ARROW = Family(
    name="ARROW",
    title="Arrow, of plain LoRAs",
    keys={**_KEYS, **_OF_GATE},
    names=(PROTOTYPES, LORA_A, LORA_B),
    parts=_parts_with(PROTOTYPES),
    terms=_arrow,
    kinds=(Gated,),
    limit="lora",
    note="written by `merge --method arrow`",
)

METEORA = Family(
    name="METEORA",
    title="MeteoRA",
    keys=_KEYS,
    sidecar_keys={**_OF_GATE, "alphas": _ALPHAS},
    names=(GATE, LORA_A, LORA_B),
    parts=_parts_with(GATE),
    terms=_meteora,
    kinds=(Gated,),
    limit="lora",
    note="converted from its model files",
)
