"""AdaMSS as PEFT 0.21 saves it: outputs in clusters, a low-rank update of each in the base's own row space.

The file has no list of clusters: they are found again as PEFT finds them, by k-means of the base's left singular
vectors, from fixed seeds. Where the trainer's machine drew or rounded otherwise the sizes differ, and the adapter is
refused; scikit-learn is needed (`peft/tuners/adamss/layer.py::update_layer`, `adamss/utils.py`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, RANK, TUNER, integer
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.formats.families.singular import svd_lowrank
from flora_vllm.terms import Added, FromBase, Offset, Probe, Term

ADAMSS_A, ADAMSS_B, PROJECTION = "adamss_A.*", "adamss_B.*", "adamss_newB"
# PEFT's constants.
_SEED, _ROUNDS, _POWERS = 123456789, 10, 2


def clusters(weight_bias: torch.Tensor, rank: int, count: int, seed: int) -> torch.Tensor:
    """The cluster of each output: (O,) int64, from the weight with the bias as a last column."""
    try:
        from sklearn.cluster import KMeans  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AdapterError("its clusters are found by scikit-learn, which is not installed; install it") from None
    left, _, _ = svd_lowrank(weight_bias, min(rank, *weight_bias.shape), _POWERS, seed)
    make: Any = KMeans  # whose stubs know n_init as a word only
    means = make(min(count, left.shape[0]), init="random", n_init=1, max_iter=_ROUNDS, random_state=_SEED)
    return torch.from_numpy(means.fit_predict(left.numpy())).long()


def _parts(_scope: Scope) -> Mapping[str, Part]:
    # One column more than inputs where the layer has a bias.
    return {PROJECTION: Part(("P", None)), ADAMSS_A: Part((None, "P")), ADAMSS_B: Part((None, None))}


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config, projection = module.config, module[PROJECTION].float()
    count = sum(name.startswith(ADAMSS_A[:-1]) for name in module.tensors)
    names = [(f"{ADAMSS_A[:-1]}{i}", f"{ADAMSS_B[:-1]}{i}") for i in range(count)]
    if {name for pair in names for name in pair} | {PROJECTION} != set(module.tensors):
        raise AdapterError(f"its clusters are not numbered from 0 in pairs: {', '.join(sorted(module.tensors))}")
    downs = [module[a].float() @ projection for a, _ in names]
    ups = [module[b].float() for _, b in names]
    if any(up.shape[1] != down.shape[0] for up, down in zip(ups, downs, strict=True)):
        raise AdapterError("two factors of one cluster have different ranks")

    def build(probe: Probe) -> tuple[Term, ...]:
        weight, bias = probe.weight(), probe.bias()
        if projection.shape[1] != weight.shape[1] + (bias is not None):
            raise AdapterError(
                f"{PROJECTION} has {projection.shape[1]} columns, the base layer {weight.shape[1]} inputs and "
                f"{'a' if bias is not None else 'no'} bias; was it trained on another model?"
            )
        whole = weight if bias is None else torch.cat([weight, bias.float()[:, None]], 1)
        cluster = clusters(whole, config["r"], config["num_subspaces"], config.get("random_seed", 0))
        sizes = cluster.bincount().tolist()
        if sizes != [up.shape[0] for up in ups]:
            raise AdapterError(
                f"the base's outputs fall into clusters of {sizes}, the file has {[up.shape[0] for up in ups]}: its "
                "trainer's machine found others; load it there and save it as LoRA (peft.convert_to_lora)"
            )
        up = torch.zeros(weight.shape[0], sum(down.shape[0] for down in downs))
        start = 0
        for i, part in enumerate(ups):
            up[cluster == i, start : start + part.shape[1]] = part
            start += part.shape[1]
        down = torch.cat(downs)
        if bias is None:
            return (Added(down, up),)
        return Added(down[:, :-1].contiguous(), up), Offset(up @ down[:, -1])

    tensors = tuple(module.tensors.values())
    rows = sum(up.shape[0] for up in ups)
    return (FromBase(build, tensors, sum(down.shape[0] for down in downs), (rows, module.scope.in_features)),)


ADAMSS = Family(
    name="ADAMSS",
    title="AdaMSS",
    keys={
        **TUNER,
        "r": RANK,
        "num_subspaces": RANK,
        "random_seed": integer(0, 2**63 - 1),
        # What they came to is in the tensors' shapes, or they are used only while training.
        **dict.fromkeys(
            (
                "subspace_rank", "use_dynamic_rank", "svd_threshold", "init_weights", "use_asa", "asa_target_subspaces",
                "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta", "asa_uncertainty_beta",
                "asa_schedule_exponent",
            ),
            ANYTHING,
        ),
    },
    names=(PROJECTION, ADAMSS_A, ADAMSS_B),
    parts=_parts,
    terms=_terms,
    kinds=(Added, Offset),
    note="refused where the base's clusters come out with other sizes; needs scikit-learn",
)  # fmt: skip
