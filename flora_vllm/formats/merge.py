"""Base model + adapter -> a checkpoint with the adapter multiplied in, which any engine can load.

Files are streamed: the header is copied, then tensor by tensor the bytes, changed or not. Dtypes, names, order and
sharding stay as they were, tied and unknown tensors included, and memory stays at one tensor.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from flora_vllm.adapter import Adapter
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.base_model import INDEX_NAME, SIDE_SUFFIXES, BaseModel, tied_fault
from flora_vllm.formats.base_probe import FileProbe
from flora_vllm.formats.out import replaceable
from flora_vllm.formats.repair import changed_of
from flora_vllm.formats.tensor_file import TORCH_DTYPES, TensorRecord, tensor_view
from flora_vllm.terms import Gain, Gated, Offset, Replaced, Swap, Term, merged, resolve
from flora_vllm.terms.gated import NO_WEIGHT

_CHUNK_BYTES = 16 << 20


class Progress(Protocol):
    """tqdm, as far as it is used here."""

    def update(self, n: float | None = 1, /) -> bool | None: ...


def merge_model(base: BaseModel, adapter: Adapter, out: Path, progress: Progress) -> None:
    """Write `base` with `adapter` merged to the directory `out`, see `replaceable`.

    `adapter` must have been read with the layout of `base`. `progress.update` is told of bytes written. `out`
    appears complete or not at all. Raises AdapterError naming every module whose weight cannot be merged.
    """
    if adapter.invocation_tokens is not None:
        raise adapter_error(
            f"{adapter.family} for {base.directory}",
            ["alora_invocation_tokens: it leaves a prompt's first tokens to the base model, which no weight can say"],
        )
    out = replaceable(out)
    plan = _plan(base, adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.parent / f".{out.name}.new-{secrets.token_hex(4)}"
    fresh.mkdir()
    try:
        _copy_side_files(base.directory, fresh)
        for name, records in base.files.items():
            with (base.directory / name).open("rb") as source, (fresh / name).open("wb") as target:
                _merge_file(source, target, records, plan, base.stores_in_out, progress)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _plan(base: BaseModel, adapter: Adapter) -> dict[str, tuple[Term, ...]]:
    """Tensor name -> the terms that change it."""
    plan, faults = {}, []
    for module, terms in adapter.modules.items():
        if (fault := tied_fault(base, module)) is not None:
            faults.append(fault)
            continue
        weight, bias = (f"{base.rename(module)}.{kind}" for kind in ("weight", "bias"))
        if len(base.records[weight].shape) == 1:
            faults.append(f"module {module!r} is a norm, which cannot be merged yet; serve the adapter as it is")
            continue
        dtype = base.records[weight].dtype
        if dtype not in TORCH_DTYPES:
            faults.append(f"tensor {weight!r} of the base model has dtype {dtype}; it cannot be merged into")
            continue
        probe = FileProbe(base, module)
        plan[weight] = resolve(terms.terms, probe)
        if any(isinstance(term, Gated) for term in plan[weight]):
            faults.append(f"module {module!r}: {NO_WEIGHT}")
        # Only the bias is asked for: a column stands for the weight.
        changes = merged(torch.zeros(_rows(base, weight), 1), probe.bias(), _of_bias(plan[weight]))[1]
        if bias in base.records:
            plan[bias] = plan[weight]
        elif changes is not None and changes.any():
            faults.append(f"module {module!r} gets a bias, which the base model has none of; it cannot be merged")
    for name in changed_of(base, adapter.saved):
        tensor = adapter.saved[name]
        module, _, kind = name.rpartition(".")
        place = f"{base.rename(module)}.{kind}"
        if (fault := _saved_fault(base, adapter, module, place, tensor)) is not None:
            faults.append(f"module {module!r} is saved whole and differs from the base model's: {fault}")
        else:
            plan[place] = (Replaced(tensor) if kind == "weight" else Offset(tensor, replaces=True),)
    if faults:
        raise adapter_error(f"{adapter.family} for {base.directory}", faults)
    return plan


def _saved_fault(base: BaseModel, adapter: Adapter, module: str, place: str, tensor: torch.Tensor) -> str | None:
    """Why `tensor` cannot take the place of the base's at `place`, or None."""
    known = base.records.get(place)
    if module in adapter.modules:
        return "it has tensors of the adapter's family, too; save it without these or without those"
    if known is None or tuple(known.shape) != tuple(tensor.shape):
        there = "nothing" if known is None else f"a tensor of shape {known.shape}"
        return f"the base model has {there} for its {tuple(tensor.shape)}; it cannot be merged"
    if base.stores_in_out:
        return "this architecture stores weights the other way round; it cannot be merged yet"
    if place.endswith(".weight") and tensor.ndim != 2:
        return "it is no linear layer and no embedding; it cannot be merged yet"
    return tied_fault(base, module)


def _rows(base: BaseModel, weight: str) -> int:
    shape = base.records[weight].shape
    return shape[1] if base.stores_in_out else shape[0]


def _of_bias(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms that a bias feels."""
    return tuple(term for term in terms if isinstance(term, Gain | Offset | Swap))


def _merge_file(
    source: BinaryIO,
    target: BinaryIO,
    records: tuple[TensorRecord, ...],
    plan: Mapping[str, tuple[Term, ...]],
    stores_in_out: bool,
    progress: Progress,
) -> None:
    _copy(source, target, records[0].start if records else os.fstat(source.fileno()).st_size, progress)
    for record in records:
        size = record.end - record.start
        if record.name in plan:
            data = bytearray(source.read(size))
            local = TensorRecord(record.name, record.dtype, record.shape, 0, size)
            target.write(_merged_bytes(tensor_view(data, local), record.name, plan[record.name], stores_in_out))
            progress.update(size)
        else:
            _copy(source, target, size, progress)


def _merged_bytes(tensor: torch.Tensor, name: str, terms: tuple[Term, ...], stores_in_out: bool) -> bytes:
    result: torch.Tensor | None
    if tensor.ndim == 1:
        result = merged(torch.zeros(tensor.shape[0], 1), tensor, _of_bias(terms))[1]
        assert result is not None, "a bias stays a bias"
    else:
        result = merged(tensor.T if stores_in_out else tensor, None, terms)[0]
        result = result.T if stores_in_out else result
    if not torch.isfinite(result).all():
        raise AdapterError(f"merging tensor {name!r} gives NaN or Inf in {tensor.dtype}; use a base model in float32")
    return result.contiguous().view(torch.uint8).numpy().tobytes()


def _copy(source: BinaryIO, target: BinaryIO, size: int, progress: Progress) -> None:
    while size:
        chunk = source.read(min(size, _CHUNK_BYTES))
        if not chunk:
            raise AdapterError(f"base model file {source.name} became shorter while it was read")
        target.write(chunk)
        size -= len(chunk)
        progress.update(len(chunk))


def _copy_side_files(source: Path, target: Path) -> None:
    """Config, tokenizer, generation config, chat template, licence; not the index of another weight format."""
    for path in sorted(source.iterdir()):
        is_other_index = path.name.endswith(".index.json") and path.name != INDEX_NAME
        wanted = path.suffix in SIDE_SUFFIXES or path.name.startswith(("LICENSE", "merges"))
        if path.is_file() and wanted and not is_other_index:
            shutil.copyfile(path, target / path.name)
