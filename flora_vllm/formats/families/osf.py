"""OSF (arXiv 2504.07097) as PEFT 0.21 saves it: the small singular components of W replaced by trained ones.

`W + U diag(S) V − U₀ diag(S₀) V₀`, the second from the base's own decomposition, as many components as the file has
(`peft/tuners/osf/layer.py::get_delta_weight`), rounded to the base's dtype as PEFT rounds them
(`utils.py::decompose_weight_matrix`). With half of W's components that is as large as W: a dense term, unless factors
are smaller.
"""

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, TARGETS
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.formats.families.singular import smallest_part
from flora_vllm.terms import Added, Dense, FromBase, Probe, Term

OSF_U, OSF_S, OSF_V = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    left, sizes, right = (module[part].float() for part in (OSF_U, OSF_S, OSF_V))
    count, out_features, in_features = sizes.shape[0], left.shape[0], right.shape[1]
    if not count:
        return ()
    if count > min(out_features, in_features):
        raise AdapterError(f"it has {count} components, a weight of ({out_features}, {in_features}) has fewer")
    as_factors = 2 * count * (out_features + in_features) < out_features * in_features

    def build(probe: Probe) -> tuple[Term, ...]:
        lost_up, lost_down = smallest_part(probe.weight(), count, probe.dtype)
        down, up = torch.cat([right, lost_down]), torch.cat([left * sizes, -lost_up], 1)
        return (Added(down, up) if as_factors else Dense(up @ down),)

    return (
        FromBase(
            build,
            (left, sizes, right),
            2 * count if as_factors else 0,
            (out_features, in_features),
            0 if as_factors else 4 * out_features * in_features,
        ),
    )


OSF = Family(
    name="OSF",
    title="OSF",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        # What they came to is in the tensors' shapes.
        **dict.fromkeys(("effective_rank", "rank_pattern", "target_svd_config"), ANYTHING),
        "init_weights": ANYTHING,  # used only while training
    },
    names=(OSF_U, OSF_S, OSF_V),
    parts=lambda _scope: {
        OSF_U: Part(("O", "R"), may_be_empty=True),
        OSF_S: Part(("R",), may_be_empty=True),
        OSF_V: Part(("R", "I"), may_be_empty=True),
    },
    terms=_terms,
    kinds=(Dense, Added),
    rank_key="effective_rank",
    note="a full matrix where many components are trained; decomposes every base weight at load",
    caution=(
        "what it replaces is rounded to the served dtype, as PEFT rounds it to the base's; serve it in the dtype that "
        "it was trained in, which the file does not tell"
    ),
)
