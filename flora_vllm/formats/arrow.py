"""Plain LoRAs -> one adapter whose tokens choose among them, as PEFT's `create_arrow_model` sets it up.

PEFT builds prototypes when a model first runs and saves none of it; here they are computed once and written, in the
layout of formats/families/gated.py. A prototype is what PEFT's fifteen steps of power iteration reach from a seeded
draw, not the singular vector itself: where two singular values are close, that is another gate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.config_keys import is_number
from flora_vllm.formats.families.gated import ARROW, PROTOTYPES
from flora_vllm.formats.families.lora import LORA_A, LORA_B
from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
from flora_vllm.formats.foreign import as_json
from flora_vllm.formats.limits import shown
from flora_vllm.formats.lora_merges import LoraPart, low_rank, part_faults
from flora_vllm.formats.names import PREFIX
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files
from flora_vllm.formats.writer import publish

_STEPS, _EPSILON = 15, 1e-8  # PEFT's


@dataclass(frozen=True)
class Routing:
    """PEFT's ArrowConfig: `top_k`, `router_temperature` and `rng_seed`, without which PEFT draws anew each time.

    Raises AdapterError with every fault.
    """

    top_k: int = 3
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not _is_whole(self.top_k) or not self.top_k >= 1:
            faults.append(f"top_k is {shown(self.top_k)}, must be an integer of at least 1")
        if not is_number(self.temperature) or not 0 < self.temperature < float("inf"):
            faults.append(f"temperature is {shown(self.temperature)}, must be a number above 0")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            faults.append(f"seed is {shown(self.seed)}, must be an integer from 0 to 2^63 - 1")
        if faults:
            raise AdapterError(f"arrow: {'; '.join(faults)}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write_arrow(path: Path, tasks: Sequence[LoraPart], general: Sequence[LoraPart], routing: Routing) -> None:
    """Write an ARROW directory, see `arrow_files`. Raises AdapterError if it could not be read back."""
    files = arrow_files(tasks, general, routing)
    faults = examine_files(files, None, Limits()).faults
    if faults:
        raise adapter_error(str(path), faults)
    publish(path, files)


def arrow_files(tasks: Sequence[LoraPart], general: Sequence[LoraPart], routing: Routing) -> dict[str, bytearray]:
    """The files of an ARROW directory: tokens choose among `tasks`, from which the mean of `general` is taken first.

    That mean is of A and of B apart (GenKnowSub, ACL 2025, in PEFT's reading). Raises AdapterError with every fault.
    """
    faults = [*_faults(tasks, general, routing)]
    if faults:
        raise adapter_error(f"an arrow of {', '.join(part.label for part in tasks)}", faults)
    tensors: dict[str, torch.Tensor] = {}
    for module in sorted(tasks[0].adapter.modules):
        for name, tensor in _routed(tasks, general, routing, module).items():
            tensors[f"{PREFIX}{module}.{name}"] = tensor.contiguous()
    config = {
        "base_model_name_or_path": tasks[0].adapter.base_model,
        "n_adapters": len(tasks),
        "peft_type": ARROW.type_name,
        "r": tasks[0].adapter.rank,
        "target_modules": sorted(tasks[0].adapter.modules),
        "temperature": routing.temperature,
        "top_k": routing.top_k,
    }
    return {CONFIG_NAME: as_json(config), WEIGHTS_NAME: bytearray(save(tensors, metadata={"format": "pt"}))}


def _faults(tasks: Sequence[LoraPart], general: Sequence[LoraPart], routing: Routing) -> Iterator[str]:
    if routing.top_k > len(tasks):
        yield f"top_k is {routing.top_k}, and there are {len(tasks)} adapters to choose from"
    for part in (*tasks, *general):
        yield from part_faults(part)
        if part.adapter.modules.keys() != tasks[0].adapter.modules.keys():
            yield f"{part.label} has other modules than {tasks[0].label}; PEFT's Arrow needs the same in all"
        if _shapes(part) != _shapes(tasks[0]) or any(rank != part.adapter.rank for rank, _, _ in _shapes(part)):
            yield f"{part.label} has several ranks, or others than {tasks[0].label}; one is needed in all"
        if part.weight != 1:
            yield f"{part.label} has the weight {part.weight}; an arrow has none, the gate weighs: give 1"


def _shapes(part: LoraPart) -> list[tuple[int, int | None, int | None]]:
    terms = [low_rank(part, module) for module in sorted(part.adapter.modules)]
    return [(term.rank, term.up.shape[0], term.down.shape[1]) for term in terms if term is not None]


def _routed(
    tasks: Sequence[LoraPart], general: Sequence[LoraPart], routing: Routing, module: str
) -> Mapping[str, torch.Tensor]:
    factors = [_factors(part, module) for part in tasks]
    if general:
        mean_A, mean_B = (
            torch.stack(side).mean(0) for side in zip(*(_factors(p, module)[:2] for p in general), strict=True)
        )
        factors = [(down - mean_A, up - mean_B, scale) for down, up, scale in factors]
    return {
        PROTOTYPES: torch.stack([prototype(down, up, routing.seed) for down, up, _ in factors]),
        LORA_A: torch.cat([down for down, _, _ in factors]),
        LORA_B: torch.cat([up * scale for _, up, scale in factors], 1),
    }


def _factors(part: LoraPart, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    term = low_rank(part, module)
    assert term is not None, "the modules are the same in all"
    assert isinstance(term.down, torch.Tensor)
    assert isinstance(term.up, torch.Tensor)
    return term.down.float(), term.up.float(), term.scale


def prototype(down_RI: torch.Tensor, up_OR: torch.Tensor, seed: int) -> torch.Tensor:
    """(I,), about the direction of x that B A x is largest for: power iteration on (B A)ᵀ B A."""
    square_RR = up_OR.T @ up_OR
    v_I = torch.randn(down_RI.shape[1], generator=torch.Generator().manual_seed(seed))
    v_I = v_I / (v_I.norm() + _EPSILON)
    for _ in range(_STEPS):
        v_I = down_RI.T @ (square_RR @ (down_RI @ v_I))
        v_I = v_I / (v_I.norm() + _EPSILON)
    return v_I
