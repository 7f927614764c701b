"""What serving benchmarks share: random adapters (real files, near the identity) and an engine's environment."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from flora_vllm.commands.server_process import engine_threads
from flora_vllm.formats import write_flora

# For an engine in the benchmark's own process.
ENGINE_HERE = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": str(engine_threads()),
}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Small enough that the text stays text; costs do not depend on values.
SPREAD = 0.02


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Module path -> (O, I) of every linear layer of a Llama-like checkpoint, from its file headers."""
    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                module = name.removesuffix(".weight")
                if module.rpartition(".")[2] in LINEARS:
                    shapes[module] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def make_pool(folder: Path, model: Path, kind: str, rank: int, count: int) -> dict[str, Path]:
    """Name -> directory of `count` adapters of `kind` (flora or lora); those already there are kept."""
    shapes = linear_shapes(model)
    pool = {f"{kind}-r{rank}-{i}": folder / f"{kind}-r{rank}-{i}" for i in range(count)}
    missing = [(i, path) for i, path in enumerate(pool.values()) if not path.exists()]
    for i, path in tqdm(missing, desc=f"{kind} rank {rank}", disable=not missing):
        generator = torch.Generator().manual_seed(i)
        factors = dict(_factors(shapes, kind, rank, generator))
        if kind == "flora":
            write_flora(path, factors)
        else:
            _write_lora(path, factors, rank)
    return pool


def _factors(
    shapes: dict[str, tuple[int, int]], kind: str, rank: int, generator: torch.Generator
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    centre = 1.0 if kind == "flora" else 0.0
    # One draw for the whole adapter: two thousand of them are made.
    count = rank * sum(out_features + in_features for out_features, in_features in shapes.values())
    values = (torch.randn(count, generator=generator) * SPREAD + centre).bfloat16()
    for module, (out_features, in_features) in shapes.items():
        a, b, values = values.split((rank * in_features, rank * out_features, len(values) - rank * sum(shapes[module])))
        yield module, (a.view(rank, in_features), b.view(out_features, rank))


def _write_lora(path: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int) -> None:
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LINEARS), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    tensors = {}
    for module, (a_RI, b_OR) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a_RI
        tensors[f"base_model.model.{module}.lora_B.weight"] = b_OR
    save_file(tensors, path / "adapter_model.safetensors")
