"""UniLoRA (arXiv 2506.00799) as PEFT 0.21 saves it: LoRA whose every number is one of one vector's, scaled.

Which one is drawn once for the whole adapter, in the order of the Hugging Face model's modules; with
`save_indices=False` (the default) the file holds the vector alone and the draw is repeated here
(`peft/tuners/unilora/model.py::generate_index, _assign_unilora_indices_and_scales`).
"""

import json
from collections.abc import Mapping
from functools import lru_cache

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, RANK, TUNER, Key
from flora_vllm.formats.families.biases import BIAS_NAMES, bias_key, bias_parts, replaced_bias
from flora_vllm.formats.families.family import INTEGERS, Config, Family, ModuleFile, Part, Scope
from flora_vllm.formats.matching import Targets
from flora_vllm.terms import Added, FromBase, Offset, Probe, Term

THETA = "unilora_theta_d"
INDICES_A, INDICES_B = "unilora_indices_A", "unilora_indices_B"
SCALES_A, SCALES_B = "unilora_scales_A", "unilora_scales_B"
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def _saved(config: Config) -> bool:
    return config.get("save_indices") is True


def _parts(scope: Scope) -> Mapping[str, Part]:
    if not _saved(scope.config):
        return bias_parts(scope)
    down, up = ("R", "I"), ("O", "R")
    return {
        INDICES_A: Part(down, dtypes=INTEGERS),
        INDICES_B: Part(up, dtypes=INTEGERS),
        SCALES_A: Part(down),
        SCALES_B: Part(up),
        **bias_parts(scope),
    }


@lru_cache(maxsize=2)
def drawn_indices(total: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of each of the adapter's numbers (total,), 1/√count of each index (length,) float32), as PEFT draws."""
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(length), total // length)
    if total % length:
        drawn = np.concatenate([drawn, rng.choice(length, size=total % length, replace=False)])
    rng.shuffle(drawn)
    indices = torch.as_tensor(drawn, dtype=torch.long)
    counts = torch.bincount(indices, minlength=length)
    return indices, torch.where(counts > 0, counts.float().rsqrt(), torch.zeros(length))


@lru_cache(maxsize=4)
def _places(selection: str, modules: tuple[tuple[str, tuple[int, int]], ...], rank: int) -> tuple[dict[str, int], int]:
    """Where each adapted module's numbers start in the draw, and how many there are; `selection`: Targets as JSON."""
    targets, places, total = Targets.from_config(json.loads(selection)), {}, 0
    for name, (out_features, in_features) in modules:
        if targets.select(name):
            places[name] = total
            total += rank * (out_features + in_features)
    return places, total


def _drawn(module: ModuleFile, theta: torch.Tensor) -> Term:
    config, rank = module.config, module.config["r"]
    selection = json.dumps({key: config.get(key) for key in _SELECTING})

    def build(probe: Probe) -> tuple[Term, ...]:
        places, total = _places(selection, tuple(probe.modules.items()), rank)
        if probe.module not in places:
            raise AdapterError(
                f"module {probe.module!r} is not among the {len(places)} that the config selects in the Hugging Face "
                "model; save the adapter with save_indices=True"
            )
        indices, scales = drawn_indices(total, theta.shape[0], config["proj_seed"])
        # PEFT keeps the scales in the base's dtype.
        values = theta * scales.to(probe.dtype).float()
        out_features, in_features = probe.shape
        start = places[probe.module]
        middle, end = start + rank * in_features, start + rank * (in_features + out_features)
        down = values[indices[start:middle]].view(rank, in_features)
        return (Added(down, values[indices[middle:end]].view(out_features, rank)),)

    return FromBase(build, (theta,), rank, (module.scope.out_features, module.scope.in_features))


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    theta = module.shared[THETA].float()
    if INDICES_A in module:
        down, up = (
            _picked(theta, module[indices], module[scales])
            for indices, scales in ((INDICES_A, SCALES_A), (INDICES_B, SCALES_B))
        )
        return (Added(down, up), *replaced_bias(module))
    if _saved(module.config) or not Targets.from_config(module.config).select(module.scope.module):
        return replaced_bias(module)
    return (_drawn(module, theta), *replaced_bias(module))


def _picked(theta: torch.Tensor, indices: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if indices.min() < 0 or indices.max() >= theta.shape[0]:
        raise AdapterError(f"its indices leave the {theta.shape[0]} numbers of {THETA}")
    return theta[indices.long()] * scales.float()


UNILORA = Family(
    name="UNILORA",
    title="UniLoRA, indices saved or drawn",
    keys={
        **TUNER,
        "r": RANK,
        "theta_d_length": RANK,
        "proj_seed": Key("an integer", lambda value: type(value) is int and value >= 0, required=True),
        "save_indices": BOOLEAN,
        "bias": bias_key("unilora"),
        # Used only while training.
        **dict.fromkeys(("unilora_dropout", "init_theta_d_bound", "init_weights"), ANYTHING),
    },
    names=(INDICES_A, INDICES_B, SCALES_A, SCALES_B, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    shared_names=(THETA,),
    shared_parts=lambda config: {THETA: Part((config["theta_d_length"],))},
    ranks=lambda scope: (scope.config["r"],),
    terms=_terms,
    kinds=(Added, Offset),
    implied=lambda config: not _saved(config),
    note="without saved indices the modules are counted in the order of the Hugging Face model",
)
