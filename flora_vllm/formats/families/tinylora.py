"""TinyLoRA, the LoRA-XS form, as PEFT 0.21 saves it: `B (Σ_i v_i P_i) A x`, A and B of the base's singular vectors.

Modules are numbered in the order of the Hugging Face model; runs of them share a vector `tinylora_v.<group>`, and each
draws its P from `projection_seed` plus its number where the file has none (`peft/tuners/tinylora/`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, RANK, TUNER, Key, is_number, is_rank
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.projections import targets_in_order
from flora_vllm.formats.families.vera import SEED, saves_projection
from flora_vllm.terms import Added, FromBase, Offset, Probe, Term
from flora_vllm.terms.shared import by_content

TINYLORA_A, TINYLORA_B, TINYLORA_P = "tinylora_A", "tinylora_B", "tinylora_P"
TINYLORA_V = "tinylora_v"


def _parts(scope: Scope) -> Mapping[str, Part]:
    parts = {TINYLORA_A: Part((None, "I")), TINYLORA_B: Part(("O", None)), **bias_parts(scope)}
    if saves_projection(scope.config):
        # Where it is missing all the same, PEFT draws it.
        parts[TINYLORA_P] = Part((scope.config["u"], None, None), optional=True)
    return parts


def group_of(number: int, count: int, weight_tying: float) -> int:
    """Which vector the module of this number, of `count`, uses."""
    groups = max(1, round(count * (1.0 - weight_tying)))
    return min(number // max(1, count // groups), groups - 1)


def drawn(rank: int, count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """P (count, rank, rank), kept in the base's dtype, used in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, 1.0 / rank**0.5, size=(count, rank, rank), generator=generator).to(dtype).float()


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config = module.config
    down, up = by_content(module[TINYLORA_A]), by_content(module[TINYLORA_B])
    saved = module.get(TINYLORA_P)
    rank = down.shape[0]
    if up.shape[1] != rank or (saved is not None and saved.shape[1:] != (rank, rank)):
        raise AdapterError(f"{TINYLORA_A!r} has rank {rank}, and {TINYLORA_B!r} or {TINYLORA_P!r} another")

    def build(probe: Probe) -> tuple[Term, ...]:
        targets = targets_in_order(probe, config)
        if probe.module not in targets:
            raise AdapterError(
                f"module {probe.module!r} is not among the {len(targets)} that the config selects in the Hugging Face "
                "model, whose order numbers them; train it on that class of the model"
            )
        number = targets.index(probe.module)
        group = group_of(number, len(targets), config.get("weight_tying", 0.0))
        vector = module.shared.get(f"{TINYLORA_V}.{group}")
        if vector is None:
            raise AdapterError(f"module {probe.module!r} is in group {group}, whose '{TINYLORA_V}.{group}' is missing")
        seed = config["projection_seed"] + number
        matrices = drawn(rank, config["u"], seed, probe.dtype) if saved is None else saved.float()
        return (Added(down, up, mid=torch.einsum("u,ujk->jk", vector.float(), matrices)),)

    held = (module[TINYLORA_A], module[TINYLORA_B], *(() if saved is None else (saved,)))
    return (FromBase(build, held, shape=(up.shape[0], down.shape[1])),)


TINYLORA = Family(
    name="TINYLORA",
    title="TinyLoRA (LoRA-XS)",
    keys={
        **TUNER,
        "bias": bias_key("tinylora"),
        "r": RANK,
        "u": Key("an integer of at least 1", is_rank, required=True),
        "weight_tying": Key("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
        "projection_seed": SEED,
        "save_projection": BOOLEAN,
        # Used only while training.
        "init_v_bound": ANYTHING,
        "tinylora_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(TINYLORA_A, TINYLORA_B, TINYLORA_P, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    shared_names=(f"{TINYLORA_V}.*",),
    shared_parts=lambda config: {f"{TINYLORA_V}.*": Part((config["u"],))},
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="singular vectors held once per engine",
)
