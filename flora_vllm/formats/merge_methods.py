"""How tensors of several LoRA adapters become one: the rules of PEFT's `add_weighted_adapter`, by its names.

linear: Σ w t. magnitude_prune (arXiv 2306.01708, step "trim"): the same of each t's largest entries. ties (the same
paper, Algorithm 1): of those, by entry, the weighted mean of what agrees with the elected sign. dare_* (arXiv
2311.03099, equation 4): entries kept by chance and divided by its share, in place of the largest. What a rule is
applied to (factors or whole matrices) is `lora_merges`' business. All in float32 and in PEFT's order of operations, so
that equal arguments give equal tensors.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.limits import shown

_PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
ON_FACTORS = ("linear", *_PRUNING)
# Of whole matrices, decomposed afterwards; `svd` alone is the decomposed sum.
ON_MATRICES = ("svd", *(f"{rule}_svd" for rule in _PRUNING))
METHODS = (*ON_FACTORS, "cat", *ON_MATRICES)
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Method:
    """One of METHODS and its options, by PEFT's names; `seed` is ours: PEFT draws from whatever state torch is in.

    Raises AdapterError with every fault: an option that the method needs is missing, or one that it ignores is given.
    """

    method: str
    density: float | None = None
    majority_sign_method: str | None = None  # None: "total" where signs are elected
    seed: int | None = None
    svd_rank: int | None = None  # None: the largest of the adapters' ranks

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"method is {shown(self.method)}; allowed: {', '.join(METHODS)}")
        faults = [
            *self._option("density", self.prunes, _is_share, "a number above 0, at most 1", needed=True),
            *self._option("majority_sign_method", self.elects, SIGNS.__contains__, " or ".join(SIGNS)),
            *self._option("seed", self.draws, _is_seed, "an integer from 0 to 2^63 - 1", needed=True),
            *self._option("svd_rank", self.decomposes, _is_rank, "an integer of at least 1"),
        ]
        if faults:
            raise AdapterError(f"method {self.method}: {'; '.join(faults)}")

    @property
    def rule(self) -> str:
        return "linear" if self.method == "svd" else self.method.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        return self.rule in _PRUNING

    @property
    def elects(self) -> bool:
        return self.rule in ("ties", "dare_ties")

    @property
    def draws(self) -> bool:
        return self.rule.startswith("dare_")

    @property
    def decomposes(self) -> bool:
        return self.method in ON_MATRICES

    def options(self) -> dict[str, Any]:
        """What was given, by name, the method itself first."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def _option(self, name: str, is_used: bool, fits: Any, allowed: str, *, needed: bool = False) -> list[str]:
        value = getattr(self, name)
        if value is None:
            return [f"it needs {name}, {allowed}"] if needed and is_used else []
        if not is_used:
            return [f"it has no {name}; leave it out"]
        return [] if fits(value) else [f"{name} is {shown(value)}, must be {allowed}"]


def method_of(options: Mapping[str, Any]) -> Method:
    """Of a request's keys. Raises AdapterError."""
    known = {f.name for f in fields(Method)}
    if strange := sorted(map(str, options.keys() - known)):
        raise AdapterError(f"{shown(strange)} are no options of a merge; allowed: {', '.join(sorted(known))}")
    return Method(**options)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def combined(tensors: Sequence[torch.Tensor], weights: Sequence[float], method: Method, place: str) -> torch.Tensor:
    """The rule of `method` on float32 tensors of one shape. `place`: the tensor's name, which the draws depend on."""
    if method.density is not None and method.density < 1:
        tensors = [_pruned(tensor, method, f"{place}/{number}") for number, tensor in enumerate(tensors)]
    stacked = torch.stack([*tensors])
    weighted = stacked * torch.tensor(weights, dtype=torch.float32).view(-1, *[1] * (stacked.ndim - 1))
    if not method.elects:
        return weighted.sum(0)
    votes = stacked.sign() if method.majority_sign_method == "frequency" else stacked
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(tensor: torch.Tensor, method: Method, place: str) -> torch.Tensor:
    assert method.density is not None, "a rule that prunes has a density"
    if method.draws:
        return tensor * drawn(tensor.shape, method, place) / method.density
    largest = tensor.abs().flatten().topk(int(method.density * tensor.numel())).indices
    kept = torch.zeros(tensor.numel())
    kept[largest] = tensor.flatten()[largest]
    return kept.view(tensor.shape)


def drawn(shape: torch.Size, method: Method, place: str) -> torch.Tensor:
    """1 with the chance `density`, else 0. Each tensor has a stream of its own: the order of modules is no matter."""
    assert method.seed is not None, "a rule that draws has a seed"
    assert method.density is not None, "and a density"
    number = int.from_bytes(hashlib.sha256(f"{method.seed}/{place}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(number)
    return torch.bernoulli(torch.full(shape, method.density), generator=generator)
