"""Several LoRA adapters -> the one that PEFT's `add_weighted_adapter` makes of them, as a PEFT directory's files.

`cat` and the `svd` of a rank that suffices are the weighted sum of the adapters; the others are what their papers
propose, in PEFT's reading: applied to the factors A and B apart, weighted by ±√|w·scale| and √|w·scale|. What PEFT
leaves out in silence (biases, layers that the first adapter does not select) is refused here.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flora_vllm.adapter import Adapter
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.base_model import BaseModel
from flora_vllm.formats.files import CONFIG_NAME, collect_files
from flora_vllm.formats.lora_writer import LoraFactors
from flora_vllm.formats.merge_methods import ON_FACTORS, Method, combined
from flora_vllm.formats.module_faults import is_embedding
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files
from flora_vllm.formats.repair import changed_of
from flora_vllm.formats.tensor_file import load_json_object
from flora_vllm.terms import Added

# Which of the targeted modules are adapted; PEFT's merge has the first adapter's.
_SELECTS = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True, eq=False)
class LoraPart:
    """`weight` of an adapter that messages call `label`; `files`: its directory's, which `adapter` was read from."""

    weight: float
    label: str
    files: Mapping[str, bytearray]
    adapter: Adapter

    @property
    def config(self) -> Mapping[str, Any]:
        return load_json_object(bytes(self.files[CONFIG_NAME]))


def read_part(weight: float, path: str, base: BaseModel | None = None) -> LoraPart:
    """The adapter directory `path` as a part. Raises AdapterError with every fault.

    `base`: what it was trained on; whole weights in the file that are this model's are none of the adapter.
    """
    files, faults = collect_files(path)
    found = examine_files(files, None, Limits())
    if faults or found.adapter is None:
        raise adapter_error(path, [*faults, *found.faults])
    adapter = found.adapter
    if base is not None and adapter.saved:
        adapter = replace(adapter, saved={name: adapter.saved[name] for name in changed_of(base, adapter.saved)})
    return LoraPart(weight, path, files, adapter)


def merged_lora(parts: Sequence[LoraPart], method: Method) -> LoraFactors:
    """The factors of the merged adapter and its scale, equal to what PEFT computes from the same arguments.

    `svd` equals PEFT's with `svd_full_matrices=False`: the same matrix, at a price that large layers allow.
    Raises AdapterError naming everything that PEFT's merge refuses or would leave out.
    """
    faults = [*_faults(parts, method)]
    if faults:
        raise adapter_error(f"a {method.method} merge of {', '.join(part.label for part in parts)}", faults)
    rank = _rank(parts, method)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in sorted({module for part in parts for module in part.adapter.modules}):
        shares = [(part.weight, terms) for part in parts if (terms := low_rank(part, module)) is not None]
        try:
            pairs[module] = _merged_pair(shares, method, module, rank)
        except AdapterError as error:
            faults.append(f"module {module!r}: {error}")
    if faults:
        raise adapter_error(f"a {method.method} merge of {', '.join(part.label for part in parts)}", faults)
    # PEFT's merged adapter has scale r/r, or r/√r where the first one has use_rslora: not what rsLoRA's scale is for.
    scale = math.sqrt(rank) if parts[0].config.get("use_rslora") else 1
    return LoraFactors(pairs, {}, scale)


def _rank(parts: Sequence[LoraPart], method: Method) -> int:
    ranks = [part.adapter.rank for part in parts]
    return sum(ranks) if method.method == "cat" else method.svd_rank or max(ranks)


def low_rank(part: LoraPart, module: str) -> Added | None:
    """The one term of a module; None if the adapter leaves it alone, or does more than `part_faults` lets pass."""
    terms = part.adapter.modules.get(module)
    found = () if terms is None else terms.of(Added)
    return found[0] if found else None


def _faults(parts: Sequence[LoraPart], method: Method) -> Iterator[str]:
    if len(parts) < 2:
        yield "there is one adapter; a merge needs at least two"
    for part in parts:
        yield from part_faults(part)
    ranks = {part.label: part.adapter.rank for part in parts}
    if method.method in ON_FACTORS and len({part.adapter.rank for part in parts}) > 1:
        yield f"ranks differ ({ranks}); {method.method} works on factors of equal ranks, cat and svd on any"
    for key in _SELECTS:
        if any(a.config.get(key) != b.config.get(key) for a, b in itertools.pairwise(parts)):
            yield f"{key} differs between the adapters' configs; PEFT's merge would leave out layers"


def part_faults(part: LoraPart) -> Iterator[str]:
    """Why PEFT's LoRA factors would not be all that the adapter does."""
    adapter = part.adapter
    if adapter.family != "LORA":
        yield f"{part.label} is {adapter.family}; these methods are for plain LoRA (a mix takes most families)"
        return
    if adapter.invocation_tokens is not None:
        yield f"{part.label} has alora_invocation_tokens: it leaves a prompt's first tokens to the base model"
    if adapter.saved:
        yield (
            f"{part.label} holds {sorted(adapter.saved)} whole, which no merge has; save it without (in PEFT "
            "save_embedding_layers=False), or, if that is the base's own, give `flora-vllm merge` the base with --base"
        )
    if any(len(terms.terms) != 1 or not terms.of(Added) for terms in adapter.modules.values()):
        yield f"{part.label} has biases, which these merges leave out; save it with bias none and without lora_bias"


def _merged_pair(
    shares: Sequence[tuple[float, Added]], method: Method, module: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A (R, I), B (O, R)) of one module, of the adapters that have it."""
    downs, ups = (
        [_own(factor).float() for factor in side] for side in zip(*((t.down, t.up) for _, t in shares), strict=True)
    )
    shapes = {(down.shape[1], up.shape[0]) for down, up in zip(downs, ups, strict=True)}
    if len(shapes) > 1:
        raise AdapterError(f"the adapters are for layers of different (in, out) features: {sorted(shapes)}")
    if not is_embedding(module, None):
        return _merged_sides(shares, downs, ups, method, module, rank)
    # PEFT's A of an embedding is the up side, and what it does to A (signs, of sides apart) it does to that.
    a, b = _merged_sides(shares, [up.T for up in ups], [down.T for down in downs], method, module, rank)
    return b.T, a.T


def _merged_sides(
    shares: Sequence[tuple[float, Added]],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    method: Method,
    module: str,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the method makes of all A (R, …) and all B (…, R)."""
    if method.method == "cat":
        down = torch.cat([down * weight * term.scale for down, (weight, term) in zip(downs, shares, strict=True)])
        up = torch.cat(ups, 1)
        # PEFT's factors have the summed rank in every module, whether all adapters have it or not.
        missing = rank - len(down)
        return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
    if method.decomposes:
        return _decomposed(shares, downs, ups, method, module, rank)
    if len({len(down) for down in downs}) > 1:
        raise AdapterError(f"ranks differ here ({[len(down) for down in downs]}); use cat or svd")
    scaled = [weight * term.scale for weight, term in shares]
    roots = [math.sqrt(abs(value)) for value in scaled]
    signed = [root if value >= 0 else -root for value, root in zip(scaled, roots, strict=True)]
    return combined(downs, signed, method, f"{module}/A"), combined(ups, roots, method, f"{module}/B")


def _own(factor: Any) -> torch.Tensor:
    assert isinstance(factor, torch.Tensor), "LoRA's factors are the file's own"
    return factor


def _decomposed(
    shares: Sequence[tuple[float, Added]],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    method: Method,
    module: str,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule on whole matrices, and of the result the largest `rank` singular values, all on B's side."""
    smaller = min(len(ups[0]), downs[0].shape[1])
    if rank > smaller:
        raise AdapterError(f"svd_rank {rank} is above the {smaller} singular values that there are; give a smaller one")
    matrices = [(up @ down) * term.scale for down, up, (_, term) in zip(downs, ups, shares, strict=True)]
    matrix_OI = combined(matrices, [weight for weight, _ in shares], method, module)
    left, sizes, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    return right[:rank].contiguous(), (left[:, :rank] * sizes[:rank]).contiguous()
