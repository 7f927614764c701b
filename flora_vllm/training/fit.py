"""Adapters of other families as FLoRA factors: LoRA by a weighted low-rank fit, IA3 exactly where that is possible.

LoRA adds `D = s B' A'` to W; FLoRA multiplies W. The fit is `min_{A,B} Σ_ik c_k (W_ik (BA)_ik - W_ik - D_ik)²` with
c_k the mean square of input k (1 if unknown): what the layer's output loses. Dividing by W never happens, so where
W is near 0 the fit is not driven by what can't be reached there; what can't be reached stays in the error.
Shape letters: I in features, O out features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flora_vllm.adapter import Adapter, ModuleTerms
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.terms import Added, Gain, Product, merged

ROUNDS = 60
# Share of the mean diagonal added to each least-squares system: keeps a row without information where it was.
RIDGE = 1e-6

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Fit:
    """`factors`: module -> (A (R, I), B (O, R)) in the weight's dtype, to be read with reduction "sum".

    `lost`: module -> the share of the update's energy, weighted by the inputs, that the factors miss (0 is exact, 1 is
    as good as no adapter)."""

    factors: Factors
    lost: Mapping[str, float]
    total_lost: float


def fit_lora(
    adapter: Adapter,
    weights: Mapping[str, torch.Tensor],
    rank: int,
    input_energy: Mapping[str, torch.Tensor] | None = None,
) -> Fit:
    """Fit every module of a LoRA adapter. `weights`: module -> W (O, I); `input_energy`: module -> c (I,).

    Raises AdapterError if the adapter isn't LoRA alone or the rank is too large for a layer.
    """
    faults = [f"{name}: has other terms than LoRA's" for name, t in adapter.modules.items() if not _is_lora(t)]
    faults += [
        f"{name}: {tuple(weights[name].shape)} is too small for rank {rank}"
        for name in adapter.modules
        if rank > min(weights[name].shape)
    ]
    if faults:
        raise adapter_error(adapter.family, faults)
    factors, lost, missed, energy = {}, {}, 0.0, 0.0
    for name, terms in adapter.modules.items():
        (low,) = terms.of(Added)
        weight_OI = weights[name].double()
        delta_OI = merged(torch.zeros_like(weight_OI), None, (low,))[0]
        c_I = torch.ones(weight_OI.shape[1]).double() if input_energy is None else input_energy[name].double()
        # They are served in the layer's dtype. In bfloat16 that is most of what a small update loses.
        pair = [f.to(weights[name].dtype) for f in fit_product(weight_OI, weight_OI + delta_OI, rank, c_I)]
        a_RI, b_OR = (f.double() for f in pair)
        module_missed = float((c_I * (weight_OI * (b_OR @ a_RI) - weight_OI - delta_OI).square()).sum())
        module_energy = float((c_I * delta_OI.square()).sum())
        factors[name] = (pair[0], pair[1])
        lost[name] = module_missed / module_energy if module_energy else 0.0
        missed, energy = missed + module_missed, energy + module_energy
    return Fit(factors, lost, missed / energy if energy else 0.0)


def _is_lora(terms: ModuleTerms) -> bool:
    return len(terms.terms) == 1 == len(terms.of(Added))


def fit_product(
    weight_OI: torch.Tensor, target_OI: torch.Tensor, rank: int, c_I: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, I), B (O, R) that make `weight ∘ (B A)` nearest to `target` in the norm weighted by c along I.

    Alternating least squares with a proximal term, from the identity (component 0) and the leading directions of the
    damped ratio of update and weight (the others): each round can only improve on the identity.
    """
    a_RI, b_OR = _start(weight_OI, target_OI, rank)
    for _ in range(ROUNDS):
        b_OR = _solve(weight_OI.square() * c_I, weight_OI * target_OI * c_I, a_RI, b_OR)
        a_RI = _solve(weight_OI.T.square(), (weight_OI * target_OI).T, b_OR.T, a_RI.T).T
    return a_RI, b_OR


def _start(weight_OI: torch.Tensor, target_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight_OI.shape
    a_RI, b_OR = torch.ones(rank, columns).to(weight_OI), torch.ones(rows, rank).to(weight_OI)
    if rank > 1:
        ratio_OI = weight_OI * (target_OI - weight_OI) / (weight_OI.square() + weight_OI.square().mean())
        u_OR, s_R, v_RI = torch.linalg.svd(ratio_OI, full_matrices=False)
        b_OR[:, 1:] = u_OR[:, : rank - 1] * s_R[: rank - 1].sqrt()
        a_RI[1:] = v_RI[: rank - 1] * s_R[: rank - 1, None].sqrt()
    return a_RI, b_OR


def _solve(
    energy_OI: torch.Tensor, moment_OI: torch.Tensor, a_RI: torch.Tensor, before_OR: torch.Tensor
) -> torch.Tensor:
    """Row o of the result minimises Σ_i energy[o, i] (b·a_i)² - 2 moment[o, i] (b·a_i) + ridge ‖b - before[o]‖²."""
    rank = len(a_RI)
    pairs_IRR = a_RI.T[:, :, None] * a_RI.T[:, None, :]
    system_ORR = (energy_OI @ pairs_IRR.flatten(1)).unflatten(1, (rank, rank))
    scale = system_ORR.diagonal(dim1=1, dim2=2).mean()
    ridge = RIDGE * scale if scale > 0 else torch.ones_like(scale)
    right_OR = moment_OI @ a_RI.T + ridge * before_OR
    return torch.linalg.solve(system_ORR + ridge * torch.eye(rank).to(system_ORR), right_OR)


def ia3_factors(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], biased: set[str]) -> Factors:
    """IA3 as rank-1 FLoRA, exactly. `shapes`: module -> (O, I); `biased`: modules with a bias.

    Raises AdapterError naming every module where it is not exact: IA3 scales the bias of an attention-side layer,
    FLoRA never does.
    """
    if adapter.family != "IA3":
        raise AdapterError(f"the adapter is {adapter.family}, not IA3")
    faults = [
        f"{name}: IA3 scales this layer's output with its bias, FLoRA leaves the bias alone; not the same"
        for name, terms in adapter.modules.items()
        if terms.of(Gain) and name in biased
    ]
    if faults:
        raise adapter_error("IA3", faults)
    factors: Factors = {}
    for name, terms in adapter.modules.items():
        rows, columns = shapes[name]
        # Copied: what is equal in two modules is read once and held by both, which a file's tensors may not do.
        for gain in terms.of(Gain):
            factors[name] = (torch.ones(1, columns).to(gain.gain), gain.gain[:, None].clone())
        for product in terms.of(Product):
            assert product.input is not None, "IA3 modules have a gain or an input scale"
            factors[name] = (product.input.clone(), torch.ones(rows, 1).to(product.input))
    return factors
