"""PSOFT (arXiv 2505.11235) as PEFT 0.21 saves it: `W + s B (R − I) A`, A and B singular vectors of the base.

The file has R alone. A and B (the largest components) are made again from the base, and a singular pair of the other
sign makes another adapter; PEFT has the same trouble on every machine whose decomposition chooses other signs than the
trainer's did (`peft/tuners/psoft/layer.py::OrthLayer, _build_psoft_ab_cache_buffers`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, NUMBER, RANK, SERIES, TUNER, Key, integer, only
from flora_vllm.formats.families.family import Config, Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.singular import svd_lowrank
from flora_vllm.terms import Added, FromBase, Probe, Term

PSOFT_R, VECTOR_A, VECTOR_B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
_EPSILON = 1e-12


def _parts(scope: Scope) -> Mapping[str, Part]:
    config, rank = scope.config, scope.config["r"]
    pairs = rank * (rank - 1) // 2
    parts = {PSOFT_R: Part((pairs,), may_be_empty=not pairs) if config.get("psoft_orth", True) else Part((rank, rank))}
    for key, name in (("psoft_mag_a", VECTOR_A), ("psoft_mag_b", VECTOR_B)):
        if config.get(key, True):
            parts[name] = Part((rank,))
    return parts


def turned(module: ModuleFile) -> torch.Tensor:
    """R (R, R): orthogonal from the file's skew entries, or as it is, between its two vectors."""
    config, rank = module.config, module.config["r"]
    if not config.get("psoft_orth", True):
        middle = module[PSOFT_R].float()
    else:
        skew = torch.zeros(rank, rank)
        rows, columns = torch.triu_indices(rank, rank, 1)
        skew[rows, columns] = module[PSOFT_R].float()
        middle = _orthogonal(skew - skew.T, config)
    before, after = module.get(VECTOR_B), module.get(VECTOR_A)
    if before is not None:
        middle = before.float()[:, None] * middle
    return middle if after is None else middle * after.float()


def _orthogonal(q_RR: torch.Tensor, config: Config) -> torch.Tensor:
    """Cayley's `(I + Q)(I − Q)⁻¹`, or its series cut as PEFT cuts it: the last power counts once, the others twice."""
    eye = torch.eye(q_RR.shape[0])
    if not config.get("use_cayley_neumann", False):
        return torch.linalg.solve(eye - q_RR, eye + q_RR, left=False)
    bound, norm = config.get("cayley_neumann_eps"), q_RR.norm()
    if bound is not None and norm > bound:
        q_RR = q_RR * (bound / (norm + _EPSILON))
    terms = config.get("num_cayley_neumann_terms", 5)
    result = eye + 2 * q_RR if terms > 1 else eye
    if terms > 2:
        power = q_RR @ q_RR
        result = result + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q_RR
            result = result + 2 * power
        result = result + power @ q_RR
    return result


# Of a decomposition whose rounds each take as long as one product with the base's weight; PEFT's are 10.
MAX_ROUNDS = 100


def _singular(weight_OI: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = config["r"]
    if rank > min(weight_OI.shape):
        raise AdapterError(f"rank {rank} is more than a base weight of shape {tuple(weight_OI.shape)} has")
    if config.get("psoft_svd", "full") == "full":
        left, sizes, right = torch.linalg.svd(weight_OI, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]
    rounds, seed = config.get("psoft_svd_lowrank_niter", 10), config.get("random_seed", 0)
    left, sizes, right = svd_lowrank(weight_OI, rank, rounds, seed)
    return left, sizes, right.T


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config = module.config
    middle = turned(module)
    middle = middle - torch.eye(middle.shape[0])
    scale = config["psoft_alpha"] / config["r"]

    def build(probe: Probe) -> tuple[Term, ...]:
        left, sizes, right = _singular(probe.weight(), config)
        sizes = sizes / scale
        if config.get("ab_svd_init", "psoft_init") == "psoft_init":
            down, up = right, left * sizes
        else:
            down, up = sizes.sqrt()[:, None] * right, left * sizes.sqrt()
        return (Added(down.contiguous(), up.contiguous(), scale, mid=middle),)

    return (FromBase(build, (middle,), middle.shape[0], (module.scope.out_features, module.scope.in_features)),)


PSOFT = Family(
    name="PSOFT",
    title="PSOFT, all forms of its rotation",
    keys={
        **TUNER,
        "r": RANK,
        "psoft_alpha": NUMBER,
        "ab_svd_init": only("psoft_init", "pissa_init"),
        "psoft_svd": only("full", "lowrank"),
        "psoft_svd_lowrank_niter": integer(0, MAX_ROUNDS),
        "random_seed": integer(0, 2**63 - 1),
        "psoft_orth": BOOLEAN,
        "psoft_mag_a": BOOLEAN,
        "psoft_mag_b": BOOLEAN,
        "use_cayley_neumann": BOOLEAN,
        "num_cayley_neumann_terms": SERIES,
        "cayley_neumann_eps": Key("null or a finite number", lambda value: value is None or NUMBER.check(value)),
        # Used only while training.
        **dict.fromkeys(("psoft_dropout", "init_weights"), ANYTHING),
    },
    names=(PSOFT_R, VECTOR_A, VECTOR_B),
    parts=_parts,
    terms=_terms,
    kinds=(Added,),
    caution=(
        "its file leaves the signs of the base's singular vectors to the machine that loads it: where these differ "
        "from the trainer's, PEFT and this server compute another adapter; convert it with `flora-vllm convert "
        "--to-lora` on the machine that trained it"
    ),
    note="the file does not fix the signs of singular vectors; decomposes every base weight at load",
)
