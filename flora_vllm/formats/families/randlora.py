"""RandLoRA (arXiv 2502.00987) as PEFT 0.21 saves it: a full-rank sum over random bases that all adapters share.

A (r, 1, m) meets the layer's smaller side, B (M, N, r) the larger one; an adapter has `randlora_lambda` (r, N) and
`randlora_gamma` (N, m). Row k · N + n of one factor meets column n · r + k of the other: the two orders differ, and
PEFT multiplies them as they are (`peft/tuners/randlora/layer.py::get_scaled_bases`). A file with `save_projection` has
the projections once for the adapter and, in vain, once more for each module.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, NUMBER, RANK, TUNER
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Config, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import largest_sides, sides
from flora_vllm.formats.families.vera import SEED, saves_projection
from flora_vllm.terms import Bases, FromBase, Offset, Probe, Shared, Term
from flora_vllm.terms.shared import by_content

RANDLORA_A, RANDLORA_B = "randlora_A", "randlora_B"
LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"


def _parts(scope: Scope) -> Mapping[str, Part]:
    rank, smaller = scope.config["r"], None
    if scope.out_features is not None and scope.in_features is not None:
        smaller = min(scope.out_features, scope.in_features)
    number = None if smaller is None else math.ceil(smaller / rank)
    parts = {LAMBDA: Part((rank, number)), GAMMA: Part((number, smaller)), **bias_parts(scope)}
    if saves_projection(scope.config):
        # The copies that PEFT writes for each module; nobody reads them.
        parts[RANDLORA_A] = Part((None, None, None), optional=True)
        parts[RANDLORA_B] = Part((None, None, None), optional=True)
    return parts


def _shared_parts(config: Config) -> Mapping[str, Part]:
    if not saves_projection(config):
        return {}
    return {RANDLORA_A: Part((config["r"], 1, None)), RANDLORA_B: Part((None, None, config["r"]))}


def _sparse(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> torch.Tensor:
    chance = torch.rand(shape, generator=generator)
    edge = 1 / (2 * sparsity)
    return (chance > 1 - edge).float() - (chance < edge).float()


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    # PEFT draws in bfloat16 where the machine has it. What it had where the adapter was trained is nowhere written.
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _draw(config: Config, larger: int, smaller: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, 1, smaller) and B (larger, N, r), in the dtype PEFT draws them in."""
    rank, generator = config["r"], torch.Generator().manual_seed(config["projection_prng_key"])
    number = math.ceil(smaller / rank)
    if config.get("very_sparse") or config.get("sparse"):
        sparsity = math.sqrt(smaller) if config.get("very_sparse") else 3
        small = _sparse((rank, 1, smaller), sparsity, generator)
        large = _sparse((larger, number, rank), sparsity, generator)
    else:
        small = _kaiming((rank, 1, smaller), generator)
        large = torch.cat([_kaiming((larger, 1, rank), generator) for _ in range(number)], 1)
    return small / small.std(), large / large.std()


def _drawn(probe: Probe, config: Config) -> tuple[Shared, Shared]:
    sizes, rank, dtype = largest_sides(probe, config), config["r"], probe.dtype
    larger, smaller = max(sizes), min(sizes)
    kind = "very" if config.get("very_sparse") else "sparse" if config.get("sparse") else "dense"
    key = f"randlora {kind} {rank} {larger} {smaller} {config['projection_prng_key']} {dtype}"

    def as_kept(which: int) -> torch.Tensor:
        return _draw(config, larger, smaller)[which].to(dtype).float().flatten(1)

    return (
        Shared(f"{key} A", (rank, smaller), lambda: as_kept(0)),
        Shared(f"{key} B", (larger, rank * math.ceil(smaller / rank)), lambda: as_kept(1)),
    )


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config, mix, gains, scope = module.config, module[LAMBDA], module[GAMMA], module.scope
    scale = config["randlora_alpha"] / config["r"]
    saved = None
    if saves_projection(config):
        saved = by_content(module.shared[RANDLORA_A]), by_content(module.shared[RANDLORA_B])

    def build(probe: Probe) -> tuple[Term, ...]:
        out_features, in_features = sides(probe)
        small, large = _drawn(probe, config) if saved is None else saved
        if large.shape[0] < max(out_features, in_features):
            raise AdapterError(f"{RANDLORA_B!r} has {large.shape[0]} features, a side of the layer more")
        return (Bases(small, large, mix, gains, in_features <= out_features, scale),)

    return (FromBase(build, (mix, gains), shape=(scope.out_features, scope.in_features)),)


RANDLORA = Family(
    name="RANDLORA",
    title="RandLoRA, dense and sparse bases",
    keys={
        **TUNER,
        "bias": bias_key("randlora"),
        "r": RANK,
        "randlora_alpha": NUMBER,
        "projection_prng_key": SEED,
        "save_projection": BOOLEAN,
        "sparse": BOOLEAN,
        "very_sparse": BOOLEAN,
        # Used only while training.
        "randlora_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(LAMBDA, GAMMA, RANDLORA_A, RANDLORA_B, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    shared_names=(RANDLORA_A, RANDLORA_B),
    shared_parts=_shared_parts,
    terms=and_biases(_terms),
    kinds=(Bases, Offset),
    note="bases held once per engine",
)

RANDLORA_DRAWN = replace(
    RANDLORA,
    name="RANDLORA_DRAWN",
    title="RandLoRA without its bases in the file",
    peft_type="RANDLORA",
    when=lambda config: not saves_projection(config) and not (config.get("sparse") or config.get("very_sparse")),
    note="bases drawn again, as PEFT draws them in bfloat16",
    caution=(
        "its bases are drawn again in bfloat16, as PEFT does where the machine has it; if it was trained on a machine "
        "without (a T4), save it again with save_projection=True"
    ),
)
