"""A decode step of a Llama-shaped model with random weights: tokens a second without adapters and with a mix of them.

Attention, norms and activations are torch's; the linear layers are ours, in the form that CUDA graphs capture. Every
adapter has terms in every linear layer; families take turns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_ops import device_us
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.terms import LayerTerms, SliceTerms, SlotLimits, group_by_slot

# (sequences of a step, adapters); 0 adapters: base tokens through the same launches.
STEPS = ((64, 0), (64, 8), (64, 64), (256, 0), (256, 256))
TINY_STEPS = ((4, 0), (4, 3))
FAMILIES = ("FLoRA rank 1", "LoRA rank 16", "IA3", "FLoRA rank 4", "DoRA rank 8")
MOST_RANK, MOST_LOW, MOST_LAYERS, CONTEXT = 4, 16, 32, 256


@dataclass(frozen=True)
class Shape:
    """Of Llama 3 8B unless a test wants less."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8

    @property
    def linears(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Name -> (slices, in features), as served."""
        kv = self.kv_heads * self.hidden // self.heads
        return {
            "qkv": ((self.hidden, kv, kv), self.hidden),
            "o": ((self.hidden,), self.hidden),
            "gate_up": ((self.inner, self.inner), self.hidden),
            "down": ((self.hidden,), self.inner),
        }

    @property
    def parameters(self) -> int:
        return sum(sum(sizes) * in_features for sizes, in_features in self.linears.values())


class Model:
    """As many decoder layers as fit, with a cache of random keys and values for each sequence."""

    def __init__(self, shape: Shape, layers: int, sequences: int, adapters: int, device: torch.device) -> None:
        self.shape, self.sequences, self.device = shape, sequences, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.x_TI = self.tensor(sequences, shape.hidden)
        self.weights = [{name: self.weight(*of) for name, of in shape.linears.items()} for _ in range(layers)]
        head = shape.hidden // shape.heads
        self.cache = [self.tensor(2, sequences, shape.kv_heads, CONTEXT, head) for _ in range(layers)]
        limits = SlotLimits(slots=max(adapters, 1), rank=MOST_RANK, low_rank=MOST_LOW)
        self.kernels = [self._kernels(layer, limits, adapters) for layer in self.weights]
        slots = torch.arange(sequences) % adapters + 1 if adapters else torch.zeros(sequences, dtype=torch.int64)
        self.step = StepBuffers(sequences, limits.slots + 1, device)
        self.step.fill(group_by_slot(slots))
        self.row_budget = sequences * MOST_RANK

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def weight(self, sizes: tuple[int, ...], in_features: int) -> torch.Tensor:
        return self.tensor(sum(sizes), in_features) * in_features**-0.5

    def _kernels(self, weights: dict[str, torch.Tensor], limits: SlotLimits, adapters: int) -> dict[str, TritonLinear]:
        kernels = {}
        for name, (sizes, in_features) in self.shape.linears.items():

            def base(x_TI: torch.Tensor, weight_OI: torch.Tensor = weights[name]) -> torch.Tensor:
                return linear(x_TI, weight_OI)

            kernel = TritonLinear(weights[name], base, sizes, DispatchRule(), in_features, limits)
            for slot in range(1, adapters + 1):
                kernel.write_slot(slot, self.terms(FAMILIES[slot % len(FAMILIES)], sizes, in_features))
            kernels[name] = kernel
        return kernels

    def terms(self, family: str, sizes: tuple[int, ...], in_features: int) -> LayerTerms:
        rank = int(family.split()[-1]) if "rank" in family else 0
        one = torch.ones(1)

        def of_slice(size: int) -> SliceTerms:
            if family == "IA3":
                return SliceTerms(torch.rand(size))
            inputs, outputs = self.tensor(rank, in_features), self.tensor(rank, size)
            if family.startswith("FLoRA"):
                return SliceTerms(a_RI=1 + inputs * 0.1, b_RO=(1 + outputs * 0.1) / rank)
            plain = one if family.startswith("LoRA") else 0.5 + torch.rand(size)
            return SliceTerms(plain, down_RI=inputs * in_features**-0.5, up_RO=outputs * 0.1)

        return tuple(map(of_slice, sizes))

    def base_step(self) -> torch.Tensor:
        return self._forward(lambda layer, name, x_TI: linear(x_TI, self.weights[layer][name]))

    def adapted_step(self) -> torch.Tensor:
        return self._forward(
            lambda layer, name, x_TI: self.kernels[layer][name].graph_form(x_TI, None, self.step, self.row_budget)
        )

    def _forward(self, product: Callable[[int, str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        shape, x_TI = self.shape, self.x_TI
        for layer, (keys, values) in enumerate(self.cache):
            qkv = product(layer, "qkv", rms_norm(x_TI, (shape.hidden,)))
            query = qkv[:, : shape.hidden].reshape(self.sequences, shape.heads, 1, -1)
            mixed = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            x_TI = x_TI + product(layer, "o", mixed.reshape(self.sequences, shape.hidden))
            gate, up = product(layer, "gate_up", rms_norm(x_TI, (shape.hidden,))).chunk(2, 1)
            x_TI = x_TI + product(layer, "down", silu(gate) * up)
        return x_TI


def _layers_that_fit(shape: Shape, sequences: int, adapters: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    sides = sum(sum(sizes) + len(sizes) * in_features for sizes, in_features in shape.linears.values())
    head = shape.hidden // shape.heads
    numbers = shape.parameters + adapters * MOST_LOW * sides + 2 * sequences * shape.kv_heads * CONTEXT * head
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MOST_LAYERS, int(free * 0.7) // (2 * numbers)))


def decode_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each number of sequences and adapters; without a GPU the step is made once and looked at."""
    on_gpu = device.type == "cuda"
    shape = Shape() if on_gpu else Shape(hidden=32, inner=48, heads=4, kv_heads=2)
    for sequences, adapters in STEPS if on_gpu else TINY_STEPS:
        layers = _layers_that_fit(shape, sequences, adapters, device)
        model = Model(shape, layers, sequences, adapters, device)
        row = {"sequences": sequences, "adapters": adapters, "layers": layers, "families": FAMILIES}
        if on_gpu:
            base, adapted = device_us([model.base_step]), device_us([model.adapted_step])
            row |= {"base_us": base, "adapted_us": adapted, "of_base": round(base["median"] / adapted["median"], 3)}
            row |= {
                f"{name}_tokens_per_s": sequences * 1e6 / us["median"]
                for name, us in (("base", base), ("adapted", adapted))
            }
        else:
            adapted_TI = model.adapted_step()
            assert adapted_TI.isfinite().all(), row
            if not adapters:
                torch.testing.assert_close(adapted_TI, model.base_step(), rtol=1e-4, atol=1e-4)
        yield row
        del model
