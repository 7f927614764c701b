"""MixLoRA (arXiv 2404.15159; TUDB-Labs/MixLoRA): LoRA in the attention, experts of LoRA in the feed-forward blocks.

`y = Σ_e w_e · down_e(act(gate_e(x)) ∘ up_e(x))` over the `top_k` experts of the largest router scores G x, w the
softmax of these; layer p of expert e is `p + α/r · B_e A_e`. So a token goes through the block once for each of its
experts. The tensors are its authors' (`mixlora/model.py`), whose `mixlora.` is `base_model.model.model.` here, as
`flora-vllm convert --pickle` names them. Their loader leaves dropout on in the experts; here it is off, as it is meant.
Where their code rounds w to the dtype of the router, it stays float32 here.
"""

import math
from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, BOOLEAN, NUMBER, RANK, TARGETS, Key, is_rank, only
from flora_vllm.formats.families.family import Config, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.lora import LORA_A, LORA_B
from flora_vllm.terms import Added, Routed, Term

EXPERT = "experts.{}."
# transformers' names (ACT2FN) of gated activations that some served model has.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")
# Their names are written out for each module: more than any model has would take a server's time.
MAX_EXPERTS = 256
_ROUTER = "model.model.layers.*.mlp.moe_gate.weight"


def _scale(config: Config) -> float:
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora", False) else rank))


def _is_in_block(module: str) -> bool:
    """Whether the module has experts; those of the attention have not."""
    return module.split(".")[-2:-1] == ["mlp"]


def _parts(scope: Scope) -> Mapping[str, Part]:
    one = {LORA_A: Part(("R", "I")), LORA_B: Part(("O", "R"))}
    if not _is_in_block(scope.module):
        return one
    experts = range(scope.config["num_experts"])
    return {EXPERT.format(e) + name: part for e in experts for name, part in one.items()}


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config, path = module.config, module.scope.module
    if not _is_in_block(path):
        return (Added(module[LORA_A], module[LORA_B], _scale(config)),)
    name = f"model.{path.rpartition('.')[0]}.moe_gate.weight"
    router = module.shared.get(name)
    if router is None:
        raise AdapterError(f"tensor 'base_model.{name}', the router of its block, is missing; the file is incomplete")
    prefixes = [EXPERT.format(e) for e in range(config["num_experts"])]
    down = torch.cat([module[prefix + LORA_A] for prefix in prefixes])
    up = torch.cat([module[prefix + LORA_B] for prefix in prefixes], 1).float() * _scale(config)
    # The router reads what gate and up read, and has as many features as down gives.
    features = up.shape[0] if path.endswith("down_proj") else down.shape[1]
    if router.shape[1] != features:
        raise AdapterError(f"the router of its block reads {router.shape[1]} features; the block has {features}")
    return (Routed(router, down, up, config.get("top_k", 2), config.get("act_fn")),)


MIXLORA = Family(
    name="MIXLORA",
    title="MixLoRA, experts of LoRA in the feed-forward",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        "r": RANK,
        "lora_alpha": NUMBER,
        "use_rslora": BOOLEAN,
        "num_experts": Key(
            f"an integer from 1 to {MAX_EXPERTS}", lambda value: is_rank(value) and value <= MAX_EXPERTS, required=True
        ),
        "top_k": Key(RANK.allowed, RANK.check),
        "bias": only("none"),
        "routing_strategy": Key(
            "'mixlora' (the authors' misc/legacy_weights_convertor.py makes it of 'mixtral')",
            lambda value: value == "mixlora",
            required=True,
        ),
        # Their block takes its activation from here; a server checks that it is the model's.
        "act_fn": only(None, *ACTIVATIONS),
        # Each of these changes what the block computes: noise on its input, experts whose rank or scale the authors'
        # own loader does not read, magnitudes that are in no file.
        "jitter_noise": only(0, 0.0),
        "expert_lora": only(None),
        "use_dora": only(False),
        # Used only while training.
        **dict.fromkeys(
            ("lora_dropout", "lora_init", "router_aux_loss_coef", "router_init_range", "router_loss"), ANYTHING
        ),
    },
    names=(LORA_A, LORA_B, EXPERT.format("*") + LORA_A, EXPERT.format("*") + LORA_B),
    parts=_parts,
    ranks=lambda scope: (scope.config["r"],),
    terms=_terms,
    shared_names=(_ROUTER,),
    shared_parts=lambda config: {_ROUTER: Part((config["num_experts"], None))},
    kinds=(Routed, Added),
    limit="lora",
    note="converted from its pickle; on blocks of gate, up and down; dropout off",
)
