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

from flora_vllm.adapter import Adapter, ModuleTerms
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.base_model import INDEX_NAME, SIDE_SUFFIXES, BaseModel
from flora_vllm.formats.tensor_file import TORCH_DTYPES, TensorRecord, tensor_view

_CHUNK_BYTES = 16 << 20


class Progress(Protocol):
    """tqdm, as far as it is used here."""

    def update(self, n: float | None = 1, /) -> bool | None: ...


def merged_weight(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, terms: ModuleTerms
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`g ∘ [s_h (B A) ∘ W (+ W if identity) + s_l U V]` by rows, and `h ∘ bias`; new tensors, dtypes kept.

    Computed in float32 (float64 for float64 weights) and rounded once. With no Hadamard term the first part is W.
    Source of the FLoRA term: arXiv 2312.05677, eq. 4. Raises AdapterError if the terms don't fit the weight.
    """
    _check_fit(weight_OI, terms)
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    base = weight_OI.to(dtype)
    merged = base
    if (hadamard := terms.hadamard) is not None:
        factor = hadamard.input_factor.to(dtype)
        if hadamard.output_factor is not None:
            factor = hadamard.output_factor.to(dtype) @ factor
        merged = base * (hadamard.scale * factor + float(hadamard.identity))
    if (low_rank := terms.low_rank) is not None:
        merged = merged + low_rank.scale * (low_rank.up.to(dtype) @ low_rank.down.to(dtype))
    bias = bias_O
    if terms.gain is not None:
        gain = terms.gain.gain.to(dtype)
        merged = gain[:, None] * merged
        if bias_O is not None and terms.gain.scales_bias:
            bias = (gain * bias_O.to(dtype)).to(bias_O.dtype)
    return merged.to(weight_OI.dtype).clone(), None if bias is None else bias.clone()


def _check_fit(weight_OI: torch.Tensor, terms: ModuleTerms) -> None:
    shape = tuple(weight_OI.shape)
    fits = len(shape) == 2 and terms.out_features in (None, shape[0]) and terms.in_features in (None, shape[1])
    if not fits:
        raise AdapterError(f"terms of ({terms.out_features}, {terms.in_features}) do not fit a weight of shape {shape}")


def merge_model(base: BaseModel, adapter: Adapter, out: Path, progress: Progress) -> None:
    """Write `base` with `adapter` merged to the directory `out`, which must be absent or empty.

    `adapter` must have been read with the layout of `base`. `progress.update` is told of bytes written. `out`
    appears complete or not at all. Raises AdapterError naming every module whose weight cannot be merged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not an empty directory; give a new one")
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


def _plan(base: BaseModel, adapter: Adapter) -> dict[str, ModuleTerms]:
    """Tensor name -> the terms that change it."""
    plan, faults = {}, []
    for module, terms in adapter.modules.items():
        weight, bias = (f"{base.rename(module)}.{kind}" for kind in ("weight", "bias"))
        dtype = base.records[weight].dtype
        if dtype not in TORCH_DTYPES:
            faults.append(f"tensor {weight!r} of the base model has dtype {dtype}; it cannot be merged into")
        plan[weight] = terms
        if bias in base.records and terms.gain is not None and terms.gain.scales_bias:
            plan[bias] = terms
    if faults:
        raise adapter_error(f"{adapter.family} for {base.directory}", faults)
    return plan


def _merge_file(
    source: BinaryIO,
    target: BinaryIO,
    records: tuple[TensorRecord, ...],
    plan: Mapping[str, ModuleTerms],
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


def _merged_bytes(tensor: torch.Tensor, name: str, terms: ModuleTerms, stores_in_out: bool) -> bytes:
    if tensor.ndim == 1:
        # The gain alone touches a bias, which is a column to it.
        merged = merged_weight(tensor[:, None], None, ModuleTerms(gain=terms.gain))[0][:, 0]
    else:
        merged = merged_weight(tensor.T if stores_in_out else tensor, None, terms)[0]
        merged = merged.T if stores_in_out else merged
    if not torch.isfinite(merged).all():
        raise AdapterError(f"merging tensor {name!r} gives NaN or Inf in {tensor.dtype}; use a base model in float32")
    return merged.contiguous().view(torch.uint8).numpy().tobytes()


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
