"""MixLoRA adapters with random factors in the authors' layout, and transformers' model with their equation in it."""

import json
import math
from pathlib import Path
from typing import Any

import torch

RANK, ALPHA, EXPERTS, TOP = 3, 5, 4, 2
TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def random_tensors(model: torch.nn.Module, targets: tuple[str, ...] = TARGETS, seed: int = 21) -> Tensors:
    """By the authors' names (TUDB-Labs/MixLoRA, `mixlora/model.py::_inject_mlp_module`)."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:  # a third of what the layers give: more only amplifies rounding
        return 0.1 * torch.randn(*shape, generator=g)

    tensors: Tensors = {}
    decoder: Any = model.get_submodule("model")
    for number, layer in enumerate(decoder.layers):
        prefix = f"mixlora.layers.{number}"
        tensors[f"{prefix}.mlp.moe_gate.weight"] = 4 * random(EXPERTS, layer.mlp.down_proj.out_features)
        for part in ("self_attn", "mlp"):
            for target in targets:
                linear = getattr(getattr(layer, part), target, None)
                if linear is None:
                    continue
                places = [""] if part == "self_attn" else [f".experts.{e}" for e in range(EXPERTS)]
                for place in places:
                    name = f"{prefix}.{part}.{target}{place}"
                    tensors[f"{name}.lora_A.weight"] = random(RANK, linear.in_features)
                    tensors[f"{name}.lora_B.weight"] = random(linear.out_features, RANK)
    return tensors


def config_of(targets: Any = TARGETS, **options: Any) -> dict[str, Any]:
    """What the authors' `MixLoraConfig.export` writes."""
    return {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "routing_strategy": "mixlora",
        "num_experts": EXPERTS,
        "top_k": TOP,
        **options,
    }


def write(path: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """The directory that their trainer leaves."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, path / "adapter_model.bin")


class _Block(torch.nn.Module):
    """A feed-forward as the paper writes it, expert by expert and token by token."""

    def __init__(self, mlp: Any, tensors: Tensors, prefix: str, scale: float, top: int) -> None:
        super().__init__()
        self.mlp, self.tensors, self.prefix, self.scale, self.top = mlp, tensors, prefix, scale, top

    def _layer(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        linear, place = getattr(self.mlp, name), f"{self.prefix}.{name}.experts.{expert}"
        if f"{place}.lora_A.weight" not in self.tensors:
            return linear(x)
        down, up = (self.tensors[f"{place}.lora_{part}.weight"].to(x.dtype) for part in "AB")
        return linear(x) + self.scale * (up @ (down @ x))

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = (self._layer(name, expert, x) for name in ("gate_proj", "up_proj"))
        return self._layer("down_proj", expert, self.mlp.act_fn(gate) * up)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = []
        for x in hidden.flatten(0, -2):
            shares = torch.softmax(self.tensors[f"{self.prefix}.moe_gate.weight"].to(x.dtype) @ x, 0)
            best = shares.topk(self.top)
            mixed = [share / best.values.sum() * self._expert(int(e), x) for share, e in zip(*best, strict=True)]
            rows.append(torch.stack(mixed).sum(0))
        return torch.stack(rows).view(hidden.shape)


def mixed_model(model: Any, tensors: Tensors, *, rslora: bool = False, top: int = TOP) -> Any:
    """`model` with the adapter in it, in its own dtype."""
    scale = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    for number, layer in enumerate(model.model.layers):
        prefix = f"mixlora.layers.{number}"
        for target in ("q_proj", "k_proj", "v_proj", "o_proj"):
            down, up = (tensors.get(f"{prefix}.self_attn.{target}.lora_{part}.weight") for part in "AB")
            if down is not None and up is not None:
                weight = getattr(layer.self_attn, target).weight
                weight.data += (scale * up.double() @ down.double()).to(weight.dtype)
        layer.mlp = _Block(layer.mlp, tensors, f"{prefix}.mlp", scale, top)
    return model.eval()
