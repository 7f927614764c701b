"""PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775) and KaSA (arXiv 2412.06071) as PEFT 0.21 saves them unconverted.

Training began from a base that had lost a part of itself: PiSSA its largest singular components, OLoRA the leading
columns of its QR factors, KaSA its smallest singular components. The served base still has that part, so it is taken
off as a second low-rank term, whose product does not depend on the signs that a library chose.
PEFT rounds the reduced base to the base's dtype, here the part is taken off exactly. Files that PEFT saved with
`path_initial_model_for_weight_conversion` are plain LoRA and say so.
Sources: `peft/tuners/lora/layer.py::pissa_init, olora_init`, `peft/tuners/lora/variants.py::KasaLinearVariant`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats import activation
from flora_vllm.formats.config_keys import NOTHING, Key, only
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.formats.families.lora import LORA, LORA_A, LORA_KEYS, LORA_NAMES, bias_terms, lora_parts, low_rank
from flora_vllm.formats.families.singular import largest_part, smallest_part
from flora_vllm.terms import Added, FromBase, Offset, Probe, Term

LORA_DIAG = "lora_diag"
# The reduced base itself, which PEFT writes beside the factors of an output layer (`save_embedding_layers`).
REDUCED = "base_layer.weight"

# PEFT reduces the base for all tokens; here those before an adapter's own meet the base as it was.
_EVERY_TOKEN = {
    activation.KEY: replace(
        NOTHING,
        allowed="null or empty: PEFT computes the tokens before these on the base that training reduced, here they are "
        "the base model's; train without one of both",
    )
}

# (W (O, I), rank, the file's scale, whether the base stores (I, O)) -> what it lost, as up (O, R) and down (R, I).
# The last is no matter of the file, whose one `fan_in_fan_out` PEFT leaves at what the last of all layers was.
Lost = Callable[[torch.Tensor, int, float, bool], tuple[torch.Tensor, torch.Tensor]]


def _largest(weight_OI: torch.Tensor, rank: int, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return largest_part(weight_OI, rank)


def _smallest(weight_OI: torch.Tensor, rank: int, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    if rank >= min(weight_OI.shape):
        raise AdapterError(f"rank {rank} leaves nothing of a base weight of shape {tuple(weight_OI.shape)}")
    return smallest_part(weight_OI, rank)


def _leading_columns(
    weight_OI: torch.Tensor, rank: int, scale: float, is_transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Q_r R_r` of the QR factors of W as the base stores it: what the first r columns span."""
    if is_transposed:
        up_IR, down_RO = _leading_columns(weight_OI.T, rank, scale, False)
        return down_RO.T, up_IR.T
    columns = torch.linalg.qr(weight_OI[:, :rank].double())[0].float()
    return columns * scale, columns.T @ weight_OI


def _check_left(left_OI: torch.Tensor, saved_OI: torch.Tensor, weight_OI: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises AdapterError if the file's reduced base is not what is left of the served one, whose dtype is given."""
    # PEFT rounds what is left to the base's dtype; of float32 decompositions 1e-4 leave room for any library's.
    rounding = max(torch.finfo(dtype).eps, torch.finfo(saved_OI.dtype).eps, 1e-4)
    if float((left_OI - saved_OI.to(left_OI.device)).norm()) > rounding * float(weight_OI.norm()):
        raise AdapterError(
            f"its {REDUCED!r} is not what its start leaves of the served base's weight; serve the base that it was "
            "trained on, or, if that is this one, save it again with save_embedding_layers=False"
        )


def _less(lost: Lost) -> Callable[[ModuleFile], tuple[Term, ...]]:
    def terms(module: ModuleFile) -> tuple[Term, ...]:
        if LORA_A not in module:
            return bias_terms(module, 1.0)
        down, up, scale = low_rank(module)
        own = Added(down, up, scale, mid=module.get(LORA_DIAG))

        def build(probe: Probe) -> tuple[Term, ...]:
            weight = probe.weight()
            lost_up, lost_down = lost(weight, own.rank, scale, probe.stores_in_out)
            if REDUCED in module:
                _check_left(weight - lost_up @ lost_down, module[REDUCED], weight, probe.dtype)
            return own, Added(lost_down.contiguous(), lost_up.contiguous(), -1.0)

        tensors = (down, up) if own.mid is None else (down, up, own.mid)
        taken = FromBase(build, tensors, 2 * own.rank, (up.shape[0], down.shape[1]))
        return (taken, *bias_terms(module, scale))

    return terms


def _row(
    name: str,
    title: str,
    lost: Lost,
    when: Callable[[Mapping[str, Any]], bool],
    keys: Mapping[str, Key],
    own: Mapping[str, Part] | None = None,
    note: str = "decomposes every base weight at load",
) -> Family:
    return replace(
        LORA,
        by_structure=False,
        name=name,
        title=title,
        peft_type="LORA",
        when=when,
        keys={**LORA_KEYS, **keys},
        names=(*LORA_NAMES, REDUCED, *(own or ())),
        parts=lambda scope: {**lora_parts(scope), REDUCED: Part(("O", "I"), optional=True), **(own or {})},
        terms=_less(lost),
        kinds=(Added, Offset),
        note=note,
    )


PISSA = _row(
    "PISSA",
    "PiSSA, unconverted",
    _largest,
    lambda config: config.get("init_lora_weights") == "pissa",
    {"init_lora_weights": only("pissa"), "lora_bias": only(False), **_EVERY_TOKEN},
)


def _is_olora(value: object) -> bool:
    return isinstance(value, str) and value.lower() == "olora"


OLORA = _row(
    "OLORA",
    "OLoRA, unconverted",
    _leading_columns,
    lambda config: _is_olora(config.get("init_lora_weights")),
    {"init_lora_weights": Key("'olora'", _is_olora), "lora_bias": only(False), **_EVERY_TOKEN},
    note="reads every base weight at load",
)

# Its regularisation weighs in training only.
KASA = _row(
    "KASA",
    "KaSA",
    _smallest,
    lambda config: bool(config.get("kasa_config")),
    {"kasa_config": Key("an object", lambda value: isinstance(value, dict)), "fan_in_fan_out": only(False)},
    {LORA_DIAG: Part(("R",))},
)
