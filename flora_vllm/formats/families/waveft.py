"""WaveFT (arXiv 2505.12532) as PEFT 0.21 saves it: a few coefficients of the update's one-level wavelet transform.

As for FourierFT the cells depend on shape, seed and number only, so the wavelets are bases that all adapters share.
PEFT gives the coefficients of the upper right quadrant to the filter that is high along rows' axis and low along
columns', and those of the lower left to the other (`peft/tuners/waveft/layer.py::get_delta_weight`, `waverec2d.py`).
"""

import math

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, NUMBER, RANK_PATTERN, TUNER, Key, is_rank
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Config, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import random_cells, sides, targets_in_order
from flora_vllm.formats.families.vera import SEED
from flora_vllm.formats.families.wavelets import LOW_PASS
from flora_vllm.terms import Added, FromBase, Offset, Probe, Shared, Sparse, Term

SPECTRUM = "waveft_spectrum"


def padded(size: int, taps: int) -> int:
    """Coefficients along an axis of `size`: what reconstruction will cut off again, made even."""
    return size + taps - 2 + (size + taps) % 2


def wavelets(coefficients_E: torch.Tensor, size: int, low_pass: tuple[float, ...]) -> torch.Tensor:
    """The values along an axis of `size` of the wavelet of each coefficient, low ones first: (size, E) float32."""
    taps = len(low_pass)
    high_pass = [(-1) ** k * low_pass[taps - 1 - k] for k in range(taps)]
    filters = torch.tensor([low_pass, high_pass], dtype=torch.float64)
    half = padded(size, taps) // 2
    is_high_E = coefficients_E >= half
    # Reconstruction cuts taps - 2 values off each end.
    place_EK = 2 * (coefficients_E - half * is_high_E)[:, None] + torch.arange(taps) - (taps - 2)
    inside_EK = (place_EK >= 0) & (place_EK < size)
    values = torch.zeros(size, len(coefficients_E), dtype=torch.float64)
    columns_EK = torch.arange(len(coefficients_E))[:, None].expand_as(place_EK)
    values[place_EK[inside_EK], columns_EK[inside_EK]] = filters[is_high_E.long()][inside_EK]
    return values.float()


def _coefficients(
    cells: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, int], taps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(along outputs, along inputs): the coefficients of each cell of a matrix in the middle of the padded one."""
    sizes = [padded(size, taps) for size in shape]
    places = [cell + (full - size) // 2 for cell, full, size in zip(cells, sizes, shape, strict=True)]
    is_high = [place >= full // 2 for place, full in zip(places, sizes, strict=True)]
    crossed = is_high[0] != is_high[1]
    return tuple(
        torch.where(crossed, (place + full // 2) % full, place) for place, full in zip(places, sizes, strict=True)
    )  # pyright: ignore[reportReturnType]


def _count(scope: Scope) -> int | None:
    """None where only the whole model tells."""
    if scope.config.get("proportional_parameters"):
        return None
    return scope.by_pattern("n_frequency_pattern", scope.config.get("n_frequency", 2592))


def _share(probe: Probe, config: Config) -> int:
    """A module's part of all coefficients (`peft/tuners/waveft/model.py::_calculate_proportional_parameters`)."""
    sizes = [math.prod(probe.modules[module]) for module in targets_in_order(probe, config)]
    if not sizes:
        raise AdapterError("the config selects no module of the base model")
    all_of_them = config.get("n_frequency", 2592) * len(sizes)
    return max(1, round(math.prod(probe.shape) / sum(sizes) * all_of_them))


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    spectrum, config, scope = module[SPECTRUM], module.config, module.scope

    def build(probe: Probe) -> tuple[Term, ...]:
        shape, count, seed = sides(probe), len(spectrum), config["random_loc_seed"]
        if config.get("proportional_parameters") and count != (share := _share(probe, config)):
            raise AdapterError(f"its {SPECTRUM} has {count} coefficients, and the module's share of all is {share}")
        if not config.get("use_idwt", True):
            return (Sparse(spectrum, *random_cells(*shape, count, seed), shape, config["scaling"]),)
        low_pass = LOW_PASS[config["wavelet_family"]]

        def side(axis: int) -> torch.Tensor:
            coefficients = _coefficients(random_cells(*shape, count, seed), shape, len(low_pass))
            return wavelets(coefficients[axis], shape[axis], low_pass)

        key = f"waveft {config['wavelet_family']} {shape} {count} {seed}"
        up = Shared(f"{key} out", (shape[0], count), lambda: side(0))
        down = Shared(f"{key} in", (count, shape[1]), lambda: side(1).T.contiguous())
        scaled = spectrum.float() * config["scaling"]
        if not scaled.isfinite().all():
            raise AdapterError(f"its {SPECTRUM} times scaling leaves the range of float32; retrain with a smaller one")
        return (Added(down, up, mid=scaled),)

    size = 0 if module.config.get("use_idwt", True) else 12 * len(spectrum)
    return (FromBase(build, (spectrum,), shape=(scope.out_features, scope.in_features), dense_bytes=size),)


WAVEFT = Family(
    name="WAVEFT",
    title="WaveFT, Daubechies, symlets and coiflets",
    keys={
        **TUNER,
        "bias": bias_key("waveft"),
        "scaling": NUMBER,
        "random_loc_seed": SEED,
        # Of coif5 PEFT 0.21 has 48 taps and pads for 30; the others it names but has no filters of.
        "wavelet_family": Key(", ".join(LOW_PASS), lambda value: value in tuple(LOW_PASS), required=True),
        "use_idwt": BOOLEAN,
        "n_frequency": Key("an integer of at least 1", is_rank),
        "n_frequency_pattern": RANK_PATTERN,
        "proportional_parameters": BOOLEAN,
        "init_weights": ANYTHING,
    },
    names=(SPECTRUM, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {SPECTRUM: Part((_count(scope),)), **bias_parts(scope)},
    terms=and_biases(_terms),
    kinds=(Sparse, Added, Offset),
    note="wavelets held once per engine",
)
