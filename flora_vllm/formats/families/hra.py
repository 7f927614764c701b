"""HRA (arXiv 2405.17484) as PEFT 0.21 saves it: W times r Householder reflections, `W Π_k (I − 2 u_k u_kᵀ)`.

The product of reflections is `I − U C Uᵀ` with a small upper triangular C, so what is served is low rank and needs the
base's products with the r columns of U alone (`peft/tuners/hra/layer.py::get_delta_weight`).
"""

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, RANK, TUNER
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.terms import Added, FromBase, Offset, Probe, Term

HRA_U = "hra_u"


def reflections(u_IR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(U (I, R) of unit columns, C (R, R)) with `Π_k (I − 2 u_k u_kᵀ) = I − U C Uᵀ`, the last one acting first."""
    u_IR = u_IR / u_IR.norm(dim=0)
    rank = u_IR.shape[1]
    c_RR = torch.zeros(rank, rank, dtype=u_IR.dtype)
    for k in range(rank):
        c_RR[:k, k] = -2 * c_RR[:k, :k] @ (u_IR[:, :k].T @ u_IR[:, k])
        c_RR[k, k] = 2
    return u_IR, c_RR


def orthogonal_reflections(u_IR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same after a Gram-Schmidt of the columns, in PEFT's order."""
    columns: list[torch.Tensor] = []
    for column in u_IR.unbind(1):
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1), 2 * torch.eye(len(columns), dtype=u_IR.dtype)


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    spanned = orthogonal_reflections if module.config.get("apply_GS") else reflections
    u_IR, c_RR = spanned(module[HRA_U].double())
    if not torch.isfinite(u_IR).all():
        raise AdapterError(f"{HRA_U} has a column of zeros, or one that depends on the others; it reflects nothing")
    down = u_IR.T.float().contiguous()

    def build(probe: Probe) -> tuple[Term, ...]:
        return (Added(down, probe.product(down).T @ c_RR.float(), -1.0),)

    return (FromBase(build, (down,), down.shape[0], (None, down.shape[1])),)


HRA = Family(
    name="HRA",
    title="HRA, Gram-Schmidt too",
    keys={
        **TUNER,
        "r": RANK,
        "apply_GS": BOOLEAN,
        "bias": bias_key("hra"),
        "init_weights": ANYTHING,  # used only while training
    },
    names=(HRA_U, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {HRA_U: Part(("I", "R")), **bias_parts(scope)},
    ranks=lambda scope: (scope.config["r"],),
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="also on quantised bases",
)
