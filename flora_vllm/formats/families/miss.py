"""MiSS (arXiv 2409.15371) as PEFT 0.21 saves it, and BONE as older PEFT saved it (the same under other names).

`init_weights` decides the mathematics: standard adds row i mod r of the block to column i of W; "mini" repeats a
narrow block along the outputs first; "bat" adds `W_oi M_o + M_o` to every r × r block of W, a full matrix
(`peft/tuners/miss/layer.py::get_delta_weight, get_delta_weight_miss`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, RANK, TUNER, Key, only
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, Dense, FromBase, Offset, Probe, Term

MISS_BLOCK, BONE_BLOCK = "miss_block", "bone_block"


def _parts(scope: Scope, name: str) -> Mapping[str, Part]:
    kind, rank = scope.config.get("init_weights", True), scope.config["r"]
    axes = {"bat": (None, rank, rank), "mini": (rank, scope.config.get("mini_r", 1))}.get(kind, (rank, "O"))
    return {name: Part(axes), **bias_parts(scope)}


def _terms(module: ModuleFile, block: torch.Tensor) -> tuple[Term, ...]:
    scope, kind = module.scope, module.config.get("init_weights", True)
    if kind == "bat":
        out_features = block.shape[0] * block.shape[1]
        if scope.out_features not in (None, out_features):
            raise AdapterError(f"its blocks make {out_features} outputs, the base layer has {scope.out_features}")
        size = 4 * out_features * (scope.in_features or 0)
        build = lambda probe: (Dense(_shifted_blocks(probe.weight(), block.float())),)  # noqa: E731
        return (FromBase(build, (block,), shape=(out_features, scope.in_features), dense_bytes=size),)
    if scope.in_features is not None and scope.out_features is not None:
        return (_folded(block, scope.out_features, scope.in_features),)

    def build(probe: Probe) -> tuple[Term, ...]:
        return (_folded(block, *probe.shape),)

    return (FromBase(build, (block,), block.shape[0]),)


def _folded(block_RO: torch.Tensor, out_features: int, in_features: int) -> Added:
    """Column i of the update is row i mod R of the block: the inputs are summed modulo R first."""
    rank, width = block_RO.shape
    if out_features % width:
        raise AdapterError(f"a block of width {width} cannot be repeated to {out_features} outputs")
    down = torch.zeros(rank, in_features, dtype=block_RO.dtype)
    columns = torch.arange(in_features)
    down[columns % rank, columns] = 1
    return Added(down, block_RO.repeat(1, out_features // width).T.contiguous())


def _shifted_blocks(weight_OI: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    size = block.shape[-1]
    out_features, in_features = weight_OI.shape
    if in_features % size:
        raise AdapterError(f"{in_features} inputs cannot be cut into blocks of {size}")
    tiles = weight_OI.reshape(out_features // size, size, in_features // size, size).permute(2, 0, 1, 3)
    return (tiles @ block + block).permute(1, 2, 0, 3).reshape(out_features, in_features)


# A method's name, in whichever letters its version wrote it.
_BIAS = Key(
    "'none', 'all' or '<method>_only'",
    lambda value: isinstance(value, str) and (value in ("none", "all") or value.endswith("_only")),
)

MISS = Family(
    name="MISS",
    title="MiSS, standard, mini and bat",
    keys={
        **TUNER,
        "r": RANK,
        "mini_r": Key(RANK.allowed, RANK.check),
        "init_weights": only(True, False, "bat", "mini"),
        "bias": _BIAS,
        "miss_dropout": ANYTHING,  # used only while training
    },
    names=(MISS_BLOCK, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: _parts(scope, MISS_BLOCK),
    terms=and_biases(lambda module: _terms(module, module[MISS_BLOCK])),
    kinds=(Dense, Added, Offset),
    note="bat is a full matrix",
)

BONE = replace(
    MISS,
    name="BONE",
    title="Bone, MiSS under its old name",
    keys={**MISS.keys, "init_weights": only(True, False, "bat"), "bone_dropout": ANYTHING},
    names=(BONE_BLOCK, *BIAS_NAMES),
    parts=lambda scope: _parts(scope, BONE_BLOCK),
    terms=and_biases(lambda module: _terms(module, module[BONE_BLOCK])),
)
