"""Layers to try the Triton kernels on, in a process where Triton interprets."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from flora_vllm.ops.dispatch import DispatchRule, PathChoice
from flora_vllm.ops.gpu import kernels as triton_kernels
from flora_vllm.ops.gpu import low_rank as triton_low_rank
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms, SlotLimits, group_by_slot

CPU = torch.device("cpu")
# Largest error relative to the output's root mean square. float32: sums of up to 200 products and 17 rows, each
# rounded once, stay within 40 half units (2^-24). float16: x * a is rounded once (2^-11, averaged over K), the
# modulated weight likewise, and the output once, where it is up to 5 times the root mean square: 8 half units.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 8 * 2**-11}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """An output element that no kernel writes is then not a number."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Recorder:
    """Stands for a kernel: launches it and keeps the launch, as a CUDA graph would."""

    def __init__(self, kernel: Any, launches: list) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            # A graph keeps numbers and addresses.
            self._launches.append((self._kernel, grid, args, kwargs))
            self._kernel[grid](*args, **kwargs)

        return launch


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The list that every launch is added to from now on."""
    launches: list = []
    recorded = {"flora_stacked", "flora_modulated", "flora_low_down", "flora_low_up"}
    for module in (triton_kernels, triton_low_rank):
        for name in recorded & vars(module).keys():
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    return launches


def name_of(launch: tuple) -> str:
    """The kernel's name, or the word that a test recorded."""
    return launch[0] if isinstance(launch[0], str) else launch[0].fn.__name__


def replay(launches: Sequence) -> None:
    """The same launches again, on the same memory."""
    for kernel, grid, args, kwargs in list(launches):
        kernel[grid](*args, **kwargs)


class Layer:
    """One layer's weight, slots and a step, with everything drawn from one seed."""

    def __init__(self, sizes: Sequence[int], in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        self.sizes = tuple(sizes)
        self.in_features = in_features
        self.dtype = dtype
        self.weight_OI = self.normal(sum(sizes), in_features) * in_features**-0.5
        self.bias_O = self.normal(sum(sizes))
        self.slots: list[LayerTerms | None] = [None]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def factors(self, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a_RI, b_RO near one, so that their sum keeps W's size."""
        widths = (self.in_features, size)
        a_RI, b_RO = (((1 + 0.3 * self.normal(rank, n)) / rank**0.5).to(self.dtype) for n in widths)
        return a_RI, b_RO

    def hadamard(self, rank: int, size: int, **other) -> SliceTerms:
        a_RI, b_RO = self.factors(rank, size)
        return SliceTerms(a_RI=a_RI, b_RO=b_RO, **other)

    def weights(self, size: int) -> torch.Tensor:
        """By-output weights of plain W x, or with 1 the same for all."""
        return 1 + 0.3 * self.normal(size).float()

    def offset(self, size: int) -> torch.Tensor:
        return self.normal(size).float()

    def uniform(self, rank: int, **other) -> LayerTerms:
        return tuple(self.hadamard(rank, size, **other) for size in self.sizes)

    def step(self, counts: Sequence[int]) -> tuple[torch.Tensor, Segments]:
        """x and segments of a step with `counts[s]` tokens of slot s, shuffled."""
        slot_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        slot_T = slot_T[torch.randperm(len(slot_T), generator=self.random)]
        return self.normal(len(slot_T), self.in_features), group_by_slot(slot_T)

    def low_rank(self, low: int, size: int) -> dict[str, torch.Tensor]:
        """down and up of a term about as large as W x."""
        down_RI = self.normal(low, self.in_features) * self.in_features**-0.5
        return {"down_RI": down_RI.to(self.dtype), "up_RO": (self.normal(low, size) * low**-0.5).to(self.dtype)}

    def kernel(self, path: PathChoice = "auto", **limits: int) -> TritonLinear:
        rule = DispatchRule(path)
        kernel = TritonLinear(self.weight_OI, self.base, self.sizes, rule, self.in_features, SlotLimits(**limits))
        for slot, terms in enumerate(self.slots):
            if slot:
                kernel.write_slot(slot, terms)
        return kernel

    def base(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI @ self.weight_OI.T

    def error(self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, bias: bool = True) -> float:
        bias_O = self.bias_O if bias else None
        expected = reference_linear(x_TI, self.weight_OI, bias_O, self.sizes, self.slots, segments)
        assert y_TO.shape == expected.shape
        error = (y_TO.double() - expected).abs().max() / expected.square().mean().sqrt()
        return float("inf") if error.isnan() else error.item()

    def check(self, kernel: TritonLinear, x_TI: torch.Tensor, segments: Segments, bias: bool = True) -> None:
        y_TO = kernel.forward(x_TI, self.bias_O if bias else None, segments)
        assert y_TO.dtype == self.dtype
        assert self.error(y_TO, x_TI, segments, bias) <= TOLERANCE[self.dtype]


def mixed_layer(dtype: torch.dtype = torch.float32) -> Layer:
    """Three slices; ranks that are no powers of two, plain terms of both kinds, a slice and a slot left alone."""
    layer = Layer((96, 64, 32), 200, dtype)
    layer.slots += [
        layer.uniform(1),
        (layer.hadamard(3, 96), None, layer.hadamard(5, 32, plain_O=layer.weights(1))),
        (
            layer.hadamard(12, 96, offset_O=layer.offset(96)),
            SliceTerms(layer.weights(64), offset_O=layer.offset(64)),
            layer.hadamard(16, 32, plain_O=layer.weights(32)),
        ),
        None,
    ]
    return layer
