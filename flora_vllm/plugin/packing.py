"""Which checkpoint tensors the slices of a packed layer come from.

vLLM says it twice. A model's `packed_modules_mapping` lists the checkpoint's names of a packed layer, one a slice. The
weight mapper that newer models load with says more: a tensor may span several slices (Qwen3.5's `in_proj_qkv` is three
of `in_proj_qkvz`), and one tensor may be loaded into several slices (Gemma 4's `k_proj` is also its value projection
where `attention_k_eq_v` holds). An adapter of such a tensor changes every slice that the tensor fills.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Origin:
    """The checkpoint module of one slice: its name beside the packed layer, and the slices that its tensor fills with
    one part each, in order; the slice in question is one of them."""

    name: str
    span: tuple[int, ...]


def origins_by_mapping(packed_modules: Mapping[str, Sequence[str]], own: str, slices: int) -> list[Origin] | str:
    """The origin of each slice by `packed_modules_mapping`, or why it does not tell. One name: one tensor for all."""
    names = list(packed_modules.get(own, [own]))
    if len(names) == 1:
        return [Origin(names[0], tuple(range(slices)))] * slices
    if len(names) == slices:
        return [Origin(name, (i,)) for i, name in enumerate(names)]
    return f"{slices} packed parts under {len(names)} checkpoint names cannot be told apart"


def origins_by_mapper(model: torch.nn.Module) -> Callable[[str, int], list[Origin] | None]:
    """(layer's path, its number of slices) -> the origin of each, None where no weight mapper of the model tells."""
    mappers = [
        (f"{path}." if path else "", mapper)
        for path, module in model.named_modules()
        if (mapper := getattr(module, "hf_to_vllm_mapper", None)) is not None
        and getattr(mapper, "orig_to_new_stacked", None)
    ]

    def origins(layer: str, slices: int) -> list[Origin] | None:
        for prefix, mapper in mappers:
            if layer.startswith(prefix):
                found: dict[int, Origin] = {}
                for name, spans in _sources(mapper, layer[len(prefix) :]):
                    for span in spans:
                        found |= {i: Origin(name, span) for i in span}
                if sorted(found) == list(range(slices)):
                    return [found[i] for i in range(slices)]
        return None

    return origins


def idle_modules(model: torch.nn.Module) -> dict[str, str]:
    """Modules that checkpoints hold and this model has no use for: path -> why an adapter of them has no effect.

    Layers that attend to another layer's keys and values have their own projections in some checkpoints.
    """
    idle = {}
    for path, module in model.named_modules():
        dropped = getattr(getattr(module, "hf_to_vllm_mapper", None), "orig_to_new_substr", None) or {}
        for name, new in dropped.items():
            if new is None and name.startswith("layers.") and name.endswith("_proj."):
                idle[f"{path}.{name[:-1]}" if path else name[:-1]] = (
                    "this layer uses another layer's keys and values, so its own projection has no effect"
                )
    return idle


def reordered_modules(model: torch.nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Those of `modules` whose rows are in another order than the checkpoint's: path -> why they are not adapted.

    Llama 4's and K2-Horizon's queries and keys, which vLLM reorders for its rotary embedding when it loads them.
    """
    owners = [path for path, module in model.named_modules() if _reorders(module)]
    prefixes = tuple(f"{path}." if path else "" for path in owners)
    why = "vLLM keeps its rows in another order than the checkpoint, which adapters cannot follow yet; train without it"
    return {m: why for m in modules if m.startswith(prefixes) and m.rpartition(".")[2] in ("q_proj", "k_proj")}


def _reorders(module: Any) -> bool:
    if getattr(module, "fold_rope_weights", False):
        return module.rope_head_dim != module.head_dim
    return hasattr(module, "permute_qk_weight_for_rotary")


def _sources(mapper: Any, layer: str) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """(checkpoint name beside the layer, the spans of slices that its tensor is loaded into) of one packed layer."""
    packed = f"{layer}.weight"
    parent = layer.rpartition(".")[0]
    for original, (new, shards) in mapper.orig_to_new_stacked.items():
        source = packed.replace(new, original, 1)
        if source == packed or mapper._map_name_with_shard(source) != (packed, shards):
            continue
        module = source.removesuffix(".weight")
        if module.rpartition(".")[0] == parent:
            yield module.rpartition(".")[2], [_span(s) for s in (shards if isinstance(shards, list) else [shards])]


def _span(shard: str | int | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(shard, tuple):
        return shard
    return (_QKV[shard] if isinstance(shard, str) else shard,)
