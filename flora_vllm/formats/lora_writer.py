"""An adapter that comes to low rank on a base model -> the plain PEFT LoRA that does the same to that base.

For families whose reading decomposes base weights (PiSSA, OLoRA, KaSA, PSOFT, OSF) or depends on the machine (PSOFT,
AdaMSS): the work is done once, and the result is served by anything that serves LoRA.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from flora_vllm.adapter import Adapter
from flora_vllm.errors import adapter_error
from flora_vllm.formats.base_model import BaseModel, tied_fault
from flora_vllm.formats.base_probe import FileProbe
from flora_vllm.formats.families.biases import BASE_BIAS, BIAS
from flora_vllm.formats.families.lora import EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B
from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
from flora_vllm.formats.merge import Progress
from flora_vllm.formats.module_faults import is_embedding
from flora_vllm.formats.names import PREFIX
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files
from flora_vllm.formats.repair import changed_of
from flora_vllm.formats.writer import publish
from flora_vllm.terms import Added, Dense, Offset, Term, merged, resolve
from flora_vllm.terms.added import factors

# The kinds of terms that a LoRA with biases can say.
BECOMES_LORA = frozenset((Added, Dense, Offset))


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """`pairs`: module -> down (R, I) and up (O, R), times `scale`; `biases`: in place of the base's (O,)."""

    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    biases: Mapping[str, torch.Tensor]
    scale: float = 1


def lora_factors(base: BaseModel, adapter: Adapter, progress: Progress) -> LoraFactors:
    """What `adapter`, read with the layout of `base`, comes to; float32. `progress.update(1)` after each module.

    Raises AdapterError naming every module that does more than add a matrix and a bias.
    """
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    biases: dict[str, torch.Tensor] = {}
    faults = []
    for module, terms in adapter.modules.items():
        if (fault := tied_fault(base, module)) is not None:
            faults.append(fault)
            continue
        probe = FileProbe(base, module)
        resolved = resolve(terms.terms, probe)
        others = sorted({type(term).__name__ for term in resolved if type(term) not in BECOMES_LORA})
        bias = probe.bias()
        offsets = [term for term in resolved if isinstance(term, Offset)]
        if others:
            faults.append(f"module {module!r}: its {', '.join(others)} is more than LoRA can say; serve it as it is")
        elif offsets and bias is None:
            faults.append(f"module {module!r} gets a bias, which the base model has none of; LoRA cannot give it one")
        else:
            pair = _joined(resolved, *base_shape(base, module))
            if pair is not None:
                pairs[module] = pair
            if offsets:
                new = merged(torch.zeros(len(offsets[0].values), 1), bias, offsets)[1]
                assert new is not None, "a bias stays a bias"
                biases[module] = new
        progress.update(1)
    if not pairs and not faults:
        faults.append("it adds no matrix to any module; LoRA needs one")
    faults += [
        f"tensor {name!r} is saved whole and differs from the base model's; LoRA files made here hold factors only"
        for name in changed_of(base, adapter.saved)
    ]
    if adapter.invocation_tokens is not None:
        faults.append("alora_invocation_tokens: the LoRA made here is one of every token; serve the adapter as it is")
    if faults:
        raise adapter_error(f"{adapter.family} for {base.directory}", faults)
    return LoraFactors(pairs, biases)


def base_shape(base: BaseModel, module: str) -> tuple[int, int]:
    rows, columns = base.records[f"{base.rename(module)}.weight"].shape
    return (columns, rows) if base.stores_in_out else (rows, columns)


def _joined(terms: tuple[Term, ...], out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    downs, ups = [], []
    for term in terms:
        if isinstance(term, Added):
            down, up = factors(term, out_features, in_features, torch.float64)
        elif isinstance(term, Dense):
            down, up = _decomposed(term.scale * term.matrix.double())
        else:
            continue
        downs.append(down)
        ups.append(up)
    if not downs or not any(len(down) for down in downs):
        return None
    return torch.cat(downs).float().contiguous(), torch.cat(ups, 1).float().contiguous()


def _decomposed(matrix_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of all that float32 tells from nothing."""
    left, sizes, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    rank = int((sizes > sizes[0] * max(matrix_OI.shape) * torch.finfo(torch.float32).eps).sum())
    roots = sizes[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def write_lora(path: Path, found: LoraFactors, base_model: str | None = None) -> None:
    """Write `found` as a LoRA directory that PEFT and we read; an adapter that is there is replaced.

    Raises AdapterError if the result could not be read back, or if the directory holds anything else.
    """
    files = lora_files(found, base_model)
    faults = examine_files(files, None, Limits()).faults
    if faults:
        raise adapter_error(str(path), faults)
    publish(path, files)


def lora_files(found: LoraFactors, base_model: str | None = None) -> dict[str, bytearray]:
    """The files of a LoRA directory that holds `found`."""
    ranks = {module: len(down) for module, (down, _) in found.pairs.items()}
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    pattern = {f"^{re.escape(module)}": r for module, r in sorted(ranks.items()) if r != rank}
    saved = "none" if not found.biases else "lora_only" if set(found.biases) <= set(found.pairs) else "all"
    config = {
        "base_model_name_or_path": base_model,
        "bias": saved,
        "init_lora_weights": True,
        # alpha / rank is the one scale at every rank.
        "lora_alpha": rank * found.scale,
        "alpha_pattern": {key: r * found.scale for key, r in pattern.items()},
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern,
        "target_modules": sorted(found.pairs),
    }
    tensors = {}
    for module, (down, up) in found.pairs.items():
        if is_embedding(module, None):
            down, up = up.T.contiguous(), down.T.contiguous()
        names = (EMBEDDING_A, EMBEDDING_B) if is_embedding(module, None) else (LORA_A, LORA_B)
        tensors |= {f"{PREFIX}{module}.{names[0]}": down, f"{PREFIX}{module}.{names[1]}": up}
    for module, bias in found.biases.items():
        tensors[f"{PREFIX}{module}.{BASE_BIAS if module in found.pairs else BIAS}"] = bias.float()
    return {
        CONFIG_NAME: bytearray(json.dumps(config, indent=2, sort_keys=True).encode()),
        WEIGHTS_NAME: bytearray(save(tensors, metadata={"format": "pt"})),
    }
