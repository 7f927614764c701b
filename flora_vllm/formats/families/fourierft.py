"""FourierFT (arXiv 2405.03003) as PEFT 0.21 saves it: a few coefficients of the update's Fourier transform.

The cells (p_i, q_i) depend on the layer's shape, `random_loc_seed` and their number, so their waves are bases that all
adapters share: with `θ = 2π(p_i o / O + q_i j / I)` the update is `scaling / (O I) Σ_i c_i cos θ`, and
cos(α + β) = cos α cos β - sin α sin β is a low-rank term of rank 2n with n numbers of the adapter's own
(`peft/tuners/fourierft/layer.py::get_delta_weight`).
"""

import math

import torch

from flora_vllm.formats.config_keys import ANYTHING, NUMBER, RANK_PATTERN_AFTER_DOT, TUNER, Key, is_rank
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import random_cells, sides
from flora_vllm.formats.families.vera import SEED
from flora_vllm.formats.patterns import AFTER_DOT
from flora_vllm.terms import Added, FromBase, Offset, Probe, Shared, Term

SPECTRUM = "fourierft_spectrum"


def waves(cells: torch.Tensor, size: int) -> torch.Tensor:
    """cos and sin of 2π · cell · place / size: (size, 2 · cells), float32. Exact before the last rounding."""
    # The product modulo the size first: a large angle has few digits left.
    turns = (torch.arange(size)[:, None] * cells) % size
    angle = turns.double() * (2 * math.pi / size)
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def _count(scope: Scope) -> int:
    return scope.by_pattern("n_frequency_pattern", scope.config.get("n_frequency", 1000), AFTER_DOT)


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    spectrum, config = module[SPECTRUM], module.config
    scope = module.scope

    def build(probe: Probe) -> tuple[Term, ...]:
        out_features, in_features = sides(probe)
        count, seed = len(spectrum), config["random_loc_seed"]
        key = f"fourierft {out_features} {in_features} {count} {seed}"

        def side(axis: int, size: int) -> torch.Tensor:
            return waves(random_cells(out_features, in_features, count, seed)[axis], size)

        down = Shared(f"{key} in", (2 * count, in_features), lambda: side(1, in_features).T.contiguous())
        up = Shared(f"{key} out", (out_features, 2 * count), lambda: side(0, out_features))
        scale = config["scaling"] / (out_features * in_features)
        return (Added(down, up, mid=torch.cat([spectrum, -spectrum]).float() * scale),)

    return (FromBase(build, (spectrum,), shape=(scope.out_features, scope.in_features)),)


FOURIERFT = Family(
    name="FOURIERFT",
    title="FourierFT",
    keys={
        **TUNER,
        "bias": bias_key("fourierft"),
        "scaling": NUMBER,
        "random_loc_seed": SEED,
        "n_frequency": Key("an integer of at least 1", is_rank),
        "n_frequency_pattern": RANK_PATTERN_AFTER_DOT,
        "init_weights": ANYTHING,
    },
    names=(SPECTRUM, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    # Another number of coefficients would have other places.
    parts=lambda scope: {SPECTRUM: Part((_count(scope),)), **bias_parts(scope)},
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="waves held once per engine",
)
