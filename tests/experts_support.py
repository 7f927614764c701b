"""A layer of experts on plain tensors, with the fused kernel that vLLM runs it on, and terms for it."""

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import torch
from device_stand_in import DEVICE, OnDevice, on_host

from flora_vllm.experts import ACTIVATIONS, AdaptedExperts, Expert, ExpertLinear
from flora_vllm.ops.terms import SliceTerms
from flora_vllm.step import Step

EXPERTS, HIDDEN, INNER, PADDED, CHOSEN = 4, 64, 40, 64, 2
CPU = torch.device("cpu")


def noise(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """A layer of experts as vLLM's CPU kernel has it: padded with zeros, packed; all on the host."""

    def __init__(self, activation: str, dtype: torch.dtype = torch.float32, *, has_bias: bool = False) -> None:
        self.activation = activation
        inner = PADDED if activation == "swigluoai" else INNER  # that one is never padded
        self.gate = noise(EXPERTS, inner, HIDDEN, seed=1, scale=HIDDEN**-0.5)
        self.up = noise(EXPERTS, inner, HIDDEN, seed=2, scale=HIDDEN**-0.5)
        self.down = noise(EXPERTS, HIDDEN, inner, seed=3, scale=inner**-0.5)
        self.biases = (noise(EXPERTS, inner, seed=4), noise(EXPERTS, inner, seed=5), noise(EXPERTS, HIDDEN, seed=6))
        self.inner, self.dtype, self.has_bias = inner, dtype, has_bias
        self.packed = self.packed_with(self.gate, self.up, self.down)
        self.plain = self.packed_with(self.gate, self.up, self.down, lambda weight, _isa: weight)

    def packed_with(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        pack: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
    ) -> SimpleNamespace:
        def both(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            if self.activation == "swigluoai":
                return torch.stack([gate, up], 2).flatten(1, 2)
            rest = (0, 0) * (gate.ndim - 2) + (0, PADDED - self.inner)
            return torch.cat([torch.nn.functional.pad(part, rest) for part in (gate, up)], 1)

        w13 = both(gate, up).to(self.dtype)
        if pack is None:
            pack = importlib.import_module("vllm._custom_ops").cpu_prepack_moe_weight
        assert pack is not None
        w2 = torch.nn.functional.pad(down, (0, PADDED - self.inner)).to(self.dtype)
        found = SimpleNamespace(
            w13_weight=pack(w13.contiguous(), "vec"),
            w2_weight=pack(w2.contiguous(), "vec"),
        )
        if self.has_bias:
            found.w13_bias = both(*self.biases[:2]).to(self.dtype)
            found.w2_bias = self.biases[2].to(self.dtype)
        return found

    def fused(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, packed: SimpleNamespace | None = None
    ):
        packed = packed or self.packed
        out = torch.empty_like(x)
        biases = (getattr(packed, "w13_bias", None), getattr(packed, "w2_bias", None))
        where = (packed.w13_weight, packed.w2_weight, *biases, weights, chosen.int())
        importlib.import_module("vllm._custom_ops").cpu_fused_moe(out, x, *where, self.activation, "vec", False)
        return out

    def adapted(
        self, step: Step, *, weighs_input: bool = False, is_packed: bool = True, on_device: bool = False
    ) -> tuple[AdaptedExperts, list[Expert]]:
        """`on_device`: not packed, and on the stand-in for a GPU."""
        from flora_vllm.plugin.expert_weights import Weights, packing

        users: Counter[int] = Counter()
        is_packed = is_packed and not on_device
        tile = packing("vec", self.dtype) if is_packed else None
        assert (tile is not None) == is_packed
        kept, stock, device = self.packed if is_packed else self.plain, self.fused, None
        if on_device:
            kept = SimpleNamespace(**{name: OnDevice(weight) for name, weight in vars(kept).items()})
            stock, device = self._fused_on_device, DEVICE
        weights = Weights(kept, self.inner, tile, is_interleaved=self.activation == "swigluoai")
        experts = []
        for i in range(EXPERTS):
            up, down = functools.partial(weights.gate_up, i), functools.partial(weights.down, i)
            gate_up = ExpertLinear(up, [self.inner] * 2, HIDDEN, weights.gate_up_bias(i), users, device)
            down = ExpertLinear(down, [HIDDEN], self.inner, weights.down_bias(i), users, device)
            experts.append(Expert(gate_up, down))
        activation = ACTIVATIONS[self.activation]
        layer = AdaptedExperts(stock, dict(enumerate(experts)), activation, step, users, weighs_input=weighs_input)
        return layer, experts

    def _fused_on_device(self, *tokens: torch.Tensor) -> torch.Tensor:
        assert all(isinstance(each, OnDevice) for each in tokens)
        return OnDevice(self.fused(*map(on_host, tokens)))


def some_tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = torch.stack(
        [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(i))[:CHOSEN] for i in range(count)]
    )
    return (
        noise(count, HIDDEN, seed=7).to(dtype),
        torch.rand(count, CHOSEN, generator=torch.Generator().manual_seed(8)),
        chosen,
    )


def low_rank(outputs: int, inputs: int, seed: int, scale: float = 1.0) -> tuple[SliceTerms, torch.Tensor]:
    """A low-rank term, and the change of the weight that it is."""
    down, up = noise(3, inputs, seed=seed, scale=inputs**-0.5), noise(3, outputs, seed=seed + 1, scale=scale)
    return SliceTerms(torch.ones(1), down_RI=down, up_RO=up), up.T @ down
