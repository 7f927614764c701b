"""FRoD as PEFT 0.21 saves it: `U (diag(l) + S) Vᵀ` in the base weight's place, V and the places of S shared by layers.

U is what the base is in terms of V: the columns of `W V⁻ᵀ`, normalised (`peft/tuners/frod/layer.py`). V comes out of a
joint decomposition of all layers, which another machine need not repeat: files without it are refused.
"""

from dataclasses import replace

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, TUNER, only
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.terms import Dense, FromBase, Offset, Probe, Term

LAMBDA_L, LAMBDA_S = "frod_lambda_l", "frod_lambda_s_values"
V, S_INDICES, S_SIZE = "frod_V", "frod_s_indices", "frod_s_size"


def category_of(module: str) -> str:
    """The name under which modules share a projection (`peft/tuners/frod/model.py::_category_from_key`)."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    category = category_of(module.scope.module)
    v_II, places, sides = (module.shared.get(f"{name}.{category}") for name in (V, S_INDICES, S_SIZE))
    if v_II is None or places is None or sides is None:
        raise AdapterError(
            f"its projections '{V}.{category}', '{S_INDICES}.{category}' and '{S_SIZE}.{category}' are not all there"
        )
    diagonal, values = module[LAMBDA_L], module[LAMBDA_S]
    if sides.tolist() != [*v_II.shape]:
        raise AdapterError(f"'{S_SIZE}.{category}' is {sides.tolist()}, and '{V}.{category}' {tuple(v_II.shape)}")
    if v_II.shape != (len(diagonal), len(diagonal)) or places.shape[1] != len(values):
        raise AdapterError(
            f"'{V}.{category}' {tuple(v_II.shape)} and '{S_INDICES}.{category}' {tuple(places.shape)} do not fit "
            f"{len(diagonal)} and {len(values)} values"
        )

    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < len(diagonal):
        raise AdapterError(f"'{S_INDICES}.{category}' has places outside of {tuple(v_II.shape)}")

    def build(probe: Probe) -> tuple[Term, ...]:
        weight_OI, v = probe.weight().double(), v_II.double()
        try:
            coordinates_OI = torch.linalg.solve(v, weight_OI.T).T
        except torch.linalg.LinAlgError as error:
            raise AdapterError(f"'{V}.{category}' has no inverse, so the base has no coordinates in it") from error
        norms = coordinates_OI.norm(dim=0)
        u_OI = torch.where(norms > 1e-12, coordinates_OI / norms, 0).to(probe.dtype).double()
        inner = torch.diag(diagonal.double()).index_put((places[0], places[1]), values.double(), accumulate=True)
        return (Dense((u_OI @ inner @ v.T - weight_OI).float()),)

    out_features, in_features = module.scope.out_features, len(diagonal)
    size = 4 * (out_features or in_features) * in_features
    return (FromBase(build, (diagonal, values), shape=(out_features, in_features), dense_bytes=size),)


FROD = Family(
    name="FROD",
    title="FRoD",
    keys={
        **TUNER,
        "bias": bias_key("frod"),
        "save_projection": replace(only(True), required=True),
        # Of projections that the file has.
        "projection_prng_key": ANYTHING,
        "sparse_rate": ANYTHING,
        "regularization_alpha": ANYTHING,
        "progressbar": ANYTHING,
        "runtime_offload_base_weight": ANYTHING,
        # Used only while training.
        "frod_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(LAMBDA_L, LAMBDA_S, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {LAMBDA_L: Part(("I",)), LAMBDA_S: Part((None,), may_be_empty=True), **bias_parts(scope)},
    shared_names=(f"{V}.*", f"{S_INDICES}.*", f"{S_SIZE}.*"),
    shared_parts=lambda _config: {
        f"{V}.*": Part((None, None)),
        f"{S_INDICES}.*": Part((2, None), dtypes=("I64",), may_be_empty=True),
        f"{S_SIZE}.*": Part((2,), dtypes=("I64",)),
    },
    terms=and_biases(_terms),
    kinds=(Dense, Offset),
    note="a dense matrix for each module",
)
