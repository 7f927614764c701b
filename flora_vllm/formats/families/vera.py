"""VeRA (arXiv 2310.11454) and PVeRA as PEFT 0.21 saves them: `λb ∘ B (λd ∘ A x)`, A and B one pair for all adapters.

Each module takes the first I columns of A and the first O rows of B. With `save_projection` the file has them; else
they are drawn from `projection_prng_key` (`peft/tuners/vera/model.py::_init_vera_A_vera_B`). PVeRA's λd and A have a
second half, a variance that only sampling looks at.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, RANK, TUNER, integer, only
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Config, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import largest_sides
from flora_vllm.terms import Added, FromBase, Offset, Probe, Shared, Term
from flora_vllm.terms.shared import by_content

VERA_A, VERA_B = "vera_A", "vera_B"
LAMBDA_D, LAMBDA_B = "vera_lambda_d", "vera_lambda_b"

SEED = integer(-(2**63), 2**63 - 1, required=True)  # what torch takes


def saves_projection(config: Config) -> bool:
    return config.get("save_projection", True)


def _parts(scope: Scope) -> Mapping[str, Part]:
    return {LAMBDA_D: Part((scope.config["r"],)), LAMBDA_B: Part(("O",)), **bias_parts(scope)}


def _shared_parts(config: Config) -> Mapping[str, Part]:
    if not saves_projection(config):
        return {}
    return {VERA_A: Part((config["r"], None)), VERA_B: Part((None, config["r"]))}


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def _drawn(probe: Probe, config: Config, rows: int) -> tuple[Shared, Shared]:
    """A of `rows` rows, of which the first r are kept, and B after it from the same generator."""
    out_features, in_features = largest_sides(probe, config)
    rank, seed, dtype = config["r"], config["projection_prng_key"], probe.dtype

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        down_RI = _kaiming(rows, in_features, generator)
        up_OR = _kaiming(out_features, rank, generator)
        # Kept in the base's dtype, used in float32.
        return down_RI[:rank].to(dtype).float(), up_OR.to(dtype).float()

    key = f"vera {rows} {rank} {out_features} {in_features} {seed} {dtype}"
    return (
        Shared(f"{key} A", (rank, in_features), lambda: draw()[0].clone()),
        Shared(f"{key} B", (out_features, rank), lambda: draw()[1]),
    )


def _first_half(both: Shared, rank: int) -> Shared:
    return Shared(f"{both.key} to {rank}", (rank, both.shape[1]), lambda: both.tensor[:rank].clone())


def _fits(down: Shared, up: Shared, scope: Scope) -> None:
    for name, have, want in (("A", down.shape[1], scope.in_features), ("B", up.shape[0], scope.out_features)):
        if want is not None and have < want:
            raise AdapterError(f"the file's projection {name} has {have} features and the layer {want}")


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config, lambda_d, lambda_b = module.config, module[LAMBDA_D], module[LAMBDA_B]
    if saves_projection(config):
        down, up = by_content(module.shared[VERA_A]), by_content(module.shared[VERA_B])
        _fits(down, up, module.scope)
        return (Added(down, up, mid=lambda_d, out=lambda_b),)

    def build(probe: Probe) -> tuple[Term, ...]:
        return (Added(*_drawn(probe, config, config["r"]), mid=lambda_d, out=lambda_b),)

    return (FromBase(build, (lambda_d, lambda_b), shape=(lambda_b.shape[0], None)),)


VERA = Family(
    name="VERA",
    title="VeRA",
    keys={
        **TUNER,
        "bias": bias_key("vera"),
        "r": RANK,
        "projection_prng_key": SEED,
        "save_projection": BOOLEAN,
        # Used only while training.
        "vera_dropout": ANYTHING,
        "d_initial": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(LAMBDA_D, LAMBDA_B, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    shared_names=(VERA_A, VERA_B),
    shared_parts=_shared_parts,
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="projections held once per engine",
)

PVERA_A, PVERA_B = "pvera_A", "pvera_B"
P_LAMBDA_D, P_LAMBDA_B = "pvera_lambda_d", "pvera_lambda_b"


def _p_parts(scope: Scope) -> Mapping[str, Part]:
    return {P_LAMBDA_D: Part((2 * scope.config["r"],)), P_LAMBDA_B: Part(("O",)), **bias_parts(scope)}


def _p_shared_parts(config: Config) -> Mapping[str, Part]:
    if not saves_projection(config):
        return {}
    return {PVERA_A: Part((2 * config["r"], None)), PVERA_B: Part((None, config["r"]))}


def _p_terms(module: ModuleFile) -> tuple[Term, ...]:
    config, rank = module.config, module.config["r"]
    lambda_d, lambda_b = module[P_LAMBDA_D][:rank], module[P_LAMBDA_B]
    if saves_projection(config):
        down, up = _first_half(by_content(module.shared[PVERA_A]), rank), by_content(module.shared[PVERA_B])
        _fits(down, up, module.scope)
        return (Added(down, up, mid=lambda_d, out=lambda_b),)

    def build(probe: Probe) -> tuple[Term, ...]:
        return (Added(*_drawn(probe, config, 2 * rank), mid=lambda_d, out=lambda_b),)

    return (FromBase(build, (lambda_d, lambda_b), shape=(lambda_b.shape[0], None)),)


PVERA = replace(
    VERA,
    name="PVERA",
    title="PVeRA",
    keys={
        **{name: key for name, key in VERA.keys.items() if name != "vera_dropout"},
        "bias": bias_key("pvera"),
        "pvera_dropout": ANYTHING,
        # A sampled answer is another one each time.
        "sample_at_inference": only(False),
        "generator_seed": ANYTHING,
    },
    names=(P_LAMBDA_D, P_LAMBDA_B, *BIAS_NAMES),
    parts=_p_parts,
    shared_names=(PVERA_A, PVERA_B),
    shared_parts=_p_shared_parts,
    terms=and_biases(_p_terms),
    note="without sampling",
)
