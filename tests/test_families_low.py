"""LoRA's variants and the families that become low rank: PEFT's own forward of the folder it saved, against ours."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families_support import Fill, fill_normal, worst_errors

torch.set_num_threads(1)

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "down_proj"]
CONV1D = ["c_attn", "c_fc"]


@dataclass(frozen=True)
class Case:
    """`architecture`, what makes the config, and where needed how parameters are filled, a task, model changes."""

    architecture: str
    config: Callable[[], peft.PeftConfig]
    fill: Fill = fill_normal
    task: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def lora(architecture: str, targets: list[str], **options: Any) -> Case:
    return Case(architecture, lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, **options))


def gentle(std: float) -> Fill:
    return lambda name, parameter: fill_normal(name, parameter, std)


CASES: dict[str, Case] = {
    # LoRA whole
    "lora-orthogonal": lora("llama", LINEAR, init_lora_weights="orthogonal"),
    "lora-gaussian": lora("llama", ATTENTION, init_lora_weights="gaussian"),
    "lora-mica": lora("llama", ATTENTION, init_lora_weights="mica"),
    "lora-monteclora": lora("llama", ATTENTION, monteclora_config=peft.MontecloraConfig()),
    "lora-velora": lora("llama", ATTENTION, velora_config=peft.VeloraConfig(num_groups=8)),
    "lora-patterns": lora("phi3", FUSED, rank_pattern={"0.self_attn.qkv_proj": 6}, alpha_pattern={"down_proj": 3}),
    "lora-pissa": lora("llama", LINEAR, init_lora_weights="pissa"),
    "lora-pissa-rslora-bias": lora("qwen2", LINEAR, init_lora_weights="pissa", use_rslora=True, bias="lora_only"),
    "lora-pissa-conv1d": lora("gpt2", CONV1D, init_lora_weights="pissa", fan_in_fan_out=True),
    "lora-olora": lora("llama", LINEAR, init_lora_weights="olora"),
    "lora-olora-fused": lora("phi3", FUSED, init_lora_weights="olora", use_rslora=True),
    # PEFT's start has the sides of the base's own weight: only of a square layer can its file be used.
    "lora-olora-conv1d": lora("gpt2", ["attn.c_proj"], init_lora_weights="olora", fan_in_fan_out=True),
    "lora-kasa": lora("llama", LINEAR, kasa_config=peft.KasaConfig()),
    "lora-kasa-lora_bias": lora("qwen2", ATTENTION, kasa_config=peft.KasaConfig(), lora_bias=True, use_rslora=True),
    "lora-bdlora": lora(
        "llama",
        LINEAR,
        use_bdlora=peft.BdLoraConfig(["o_proj", "down"], ["q_proj", "k_proj", "v_proj", "gate", "up"], nblocks=2),
    ),
    "lora-bdlora-paths": lora(
        "llama", LINEAR, use_bdlora=peft.BdLoraConfig(["self_attn.o", "mlp.down"], ["0.mlp.up", "attn.q"], 2, False)
    ),
    "lora-bdlora-bias": lora(
        "qwen2",
        [*ATTENTION, "k_proj"],
        use_bdlora=peft.BdLoraConfig(["v_proj"], ["q_proj"], nblocks=4, match_strict=False),
        lora_bias=True,
        bias="all",
    ),
}


# Low rank once loaded.
CASES |= {
    "loha": Case("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, init_weights=False)),
    "loha-patterns": Case(
        "qwen2",
        lambda: peft.LoHaConfig(
            r=3, alpha=5, target_modules=LINEAR, rank_pattern={"up_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 2}
        ),
    ),
    "adalora": Case("llama", lambda: adalora()),
    "adalora-biases": Case("qwen2", lambda: adalora(lora_alpha=-1, bias="lora_only")),
    "adalora-conv1d": Case("gpt2", lambda: adalora(CONV1D, fan_in_fan_out=True)),
    "vblora": Case("llama", lambda: vblora(topk=2)),
    "vblora-weights": Case("qwen2", lambda: vblora(topk=3, save_only_topk_weights=True, bias="vblora_only")),
    "vblora-weights-top1": Case("llama", lambda: vblora(topk=1, save_only_topk_weights=True)),
    "vblora-conv1d": Case("gpt2", lambda: vblora(CONV1D, topk=2, fan_in_fan_out=True)),
    "unilora": Case("llama", lambda: unilora(LINEAR), gentle(1)),
    "unilora-indices": Case("qwen2", lambda: unilora(LINEAR, save_indices=True, bias="unilora_only")),
    "unilora-layers": Case("qwen2", lambda: unilora(ATTENTION, layers_to_transform=[1], bias="all", proj_seed=7)),
    "unilora-conv1d": Case("gpt2", lambda: unilora(CONV1D, fan_in_fan_out=True), gentle(2)),
    "miss": Case("llama", lambda: peft.MissConfig(r=10, target_modules=LINEAR)),
    "miss-bias": Case("qwen2", lambda: peft.MissConfig(r=7, target_modules=LINEAR, bias="MiSS_only")),
    "miss-mini": Case("llama", lambda: peft.MissConfig(r=8, mini_r=16, target_modules=LINEAR, init_weights="mini")),
    "miss-bat": Case("qwen2", lambda: peft.MissConfig(r=8, target_modules=LINEAR, init_weights="bat"), gentle(0.1)),
    "gralora": Case("llama", lambda: peft.GraloraConfig(r=8, alpha=6, gralora_k=2, target_modules=LINEAR)),
    "gralora-hybrid": Case(
        "qwen2",
        lambda: peft.GraloraConfig(r=8, alpha=6, gralora_k=4, hybrid_r=3, target_modules=LINEAR, bias="gralora_only"),
    ),
    "gralora-conv1d": Case(
        "gpt2",
        lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=2, target_modules=CONV1D, fan_in_fan_out=True),
    ),
    "delora": Case(
        "llama", lambda: peft.DeloraConfig(r=4, target_modules=LINEAR, rank_pattern={"up_proj": 2}), gentle(3)
    ),
    "delora-bias": Case(
        "qwen2",
        lambda: peft.DeloraConfig(r=4, target_modules=LINEAR, bias="delora_only", lambda_pattern={"q_proj": 3}),
    ),
    "poly": Case("llama", lambda: poly(n_splits=1), task="1"),
    "poly-splits": Case("qwen2", lambda: poly(n_splits=2), task="2"),
}


def adalora(targets: list[str] = LINEAR, **options: Any) -> peft.AdaLoraConfig:
    settings = {"init_r": 6, "target_r": 3, "lora_alpha": 5, "total_step": 20, "tinit": 2, "tfinal": 5, **options}
    return peft.AdaLoraConfig(target_modules=targets, **settings)


def vblora(targets: list[str] = LINEAR, **options: Any) -> peft.VBLoRAConfig:
    return peft.VBLoRAConfig(r=3, num_vectors=20, vector_length=16, target_modules=targets, **options)


def unilora(targets: list[str], **options: Any) -> peft.UniLoraConfig:
    return peft.UniLoraConfig(r=3, theta_d_length=50, target_modules=targets, **options)


def poly(**options: Any) -> peft.PolyConfig:
    return peft.PolyConfig(r=4, n_tasks=3, n_skills=2, target_modules=LINEAR, **options)


# Low rank once the base was asked.
CASES |= {
    "peanut": Case("llama", lambda: peft.PeanutConfig(r=6, depth=0, target_modules=LINEAR)),
    "peanut-deep": Case("qwen2", lambda: peft.PeanutConfig(r=6, depth=2, scaling=0.7, target_modules=LINEAR)),
    "peanut-tanh": Case("phi3", lambda: peft.PeanutConfig(r=4, depth=1, act_fn="tanh", target_modules=FUSED)),
    "hra": Case("llama", lambda: peft.HRAConfig(r=4, target_modules=LINEAR)),
    "hra-gram-schmidt": Case("qwen2", lambda: peft.HRAConfig(r=4, target_modules=LINEAR, apply_GS=True)),
    "hra-bias": Case("qwen2", lambda: peft.HRAConfig(r=6, target_modules=ATTENTION, bias="hra_only")),
    "deft": Case("llama", lambda: peft.DeftConfig(r=4, target_modules=LINEAR, alpha=6)),
    "deft-qr": Case(
        "qwen2", lambda: peft.DeftConfig(r=4, target_modules=LINEAR, decomposition_method="qr", bias="deft_only")
    ),
    "deft-para": Case("llama", lambda: peft.DeftConfig(r=4, target_modules=LINEAR, para=True), gentle(0.1)),
    "deft-conv1d": Case("gpt2", lambda: peft.DeftConfig(r=4, target_modules=CONV1D, fan_in_fan_out=True)),
    "psoft": Case("llama", lambda: peft.PsoftConfig(r=6, psoft_alpha=12, target_modules=LINEAR)),
    "psoft-neumann": Case(
        "qwen2",
        lambda: peft.PsoftConfig(
            r=6, psoft_alpha=6, target_modules=LINEAR, use_cayley_neumann=True, cayley_neumann_eps=0.5
        ),
    ),
    "psoft-neumann3": Case(
        "llama",
        lambda: peft.PsoftConfig(
            r=4,
            target_modules=ATTENTION,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=3,
            psoft_mag_a=False,
            psoft_mag_b=False,
        ),
    ),
    "psoft-lowrank": Case(
        "llama",
        lambda: peft.PsoftConfig(
            r=6, target_modules=LINEAR, psoft_svd="lowrank", ab_svd_init="pissa_init", psoft_orth=False, random_seed=4
        ),
    ),
    "osf": Case("llama", lambda: peft.OSFConfig(target_modules=LINEAR, effective_rank=40), gentle(0.2)),
    "osf-factors": Case("qwen2", lambda: peft.OSFConfig(target_modules=LINEAR, rank_pattern={"up_proj": 0.5})),
}


def run(case: Case, path: Path) -> tuple[float, float]:
    return worst_errors(case.config(), path, case.architecture, case.fill, task=case.task, **case.changes)


if importlib.util.find_spec("sklearn") is not None:  # PEFT and we find AdaMSS's clusters with it
    CASES["adamss"] = Case(
        "llama",
        lambda: peft.AdamssConfig(r=20, num_subspaces=3, subspace_rank=2, target_modules=[*ATTENTION, "up_proj"]),
    )


# PEFT takes a LoRA bias for a shard of a factor and says so.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_pefts_forward(name: str, tmp_path: Path, record_property) -> None:
    error, effect = run(CASES[name], tmp_path)
    record_property("error", error)
    assert effect > 0.01, "the adapter must do something"
    assert error < 1e-4 * max(1.0, effect)
    assert error < 0.01 * effect
