"""The safetensors layout, read without copying: tensors are views of the buffer they came in.

`safetensors.torch.load` copies every tensor once more and reads tensors of dtypes we refuse. The format is an
8-byte little-endian header length, a JSON header of that length, then the data; the same rules are enforced here
as by the safetensors library: offsets in order, no gap, no overlap, nothing left over.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.limits import MAX_HEADER_BYTES, MAX_TENSORS, brief, name_fault, value_fault
from flora_vllm.pacing import pace

LENGTH_BYTES = 8
_MAX_AXES = 8
_MOST = 1 << 63
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8,
}  # fmt: skip
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRecord:
    """One header entry; `start` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(header: bytes | bytearray | memoryview, file_bytes: int) -> list[TensorRecord]:
    """The tensors a header (without its length) declares, in file order.

    Raises AdapterError if the header is not exactly that of a file of `file_bytes` bytes.
    """
    text = bytes(header)
    # One of these for each tensor, and it is counted without parsing.
    if (count := text.count(b"data_offsets")) > MAX_TENSORS:
        raise AdapterError(f"its header has {count} tensors; at most {MAX_TENSORS} are read")
    try:
        entries = _parse_object(text)
    except AdapterError as error:
        raise AdapterError(f"its safetensors header is corrupt: {error}") from None
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise AdapterError(f"its header has {len(entries)} tensors; at most {MAX_TENSORS} are read")
    data_start = LENGTH_BYTES + len(header)
    records = sorted((_record(*entry, data_start) for entry in entries.items()), key=lambda record: record.start)
    position = data_start
    for record in records:
        if record.start != position:
            raise AdapterError(f"tensor {record.name!r} starts at byte {record.start}, expected {position}: corrupt")
        position = record.end
    if position != file_bytes:
        raise AdapterError(
            f"it has {file_bytes} bytes but its header describes {position}: "
            f"{'truncated' if file_bytes < position else 'trailing data'}; copy it again"
        )
    return records


def _record(name: str, entry: Any, data_start: int) -> TensorRecord:
    pace()
    if fault := name_fault(name):
        raise AdapterError(f"its header is refused: {fault}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"header entry of tensor {name!r} is not {{dtype, shape, data_offsets}}: corrupt")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterError(f"header entry of tensor {name!r} is malformed: corrupt")
    if math.prod(max(size, 1) for size in shape) >= _MOST:  # torch counts the strides of what is empty, too
        raise AdapterError(f"tensor {name!r}: shape {shape} is beyond what a tensor can have: corrupt")
    begin, end = offsets
    if end < begin or (dtype in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[dtype]):
        raise AdapterError(f"tensor {name!r}: {end - begin} bytes do not hold {brief(dtype)} of shape {shape}: corrupt")
    return TensorRecord(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: object) -> bool:
    """A few whole numbers: no tensor has more axes, and none is larger than a file can be."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(v) is int and 0 <= v < _MOST for v in value)  # no bool is; json makes no other kind
    )


def header_length(prefix: bytes | bytearray | memoryview, file_bytes: int) -> int:
    """Bytes of the header, from the file's first 8 bytes. Raises AdapterError if it cannot be in the file."""
    if file_bytes < LENGTH_BYTES:
        raise AdapterError(f"it has {file_bytes} bytes, too few for a safetensors file: truncated")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise AdapterError(
            f"its header claims {length} bytes of a file of {file_bytes}: truncated or not a safetensors file"
        )
    return length


def parse_records(data: bytearray) -> list[TensorRecord]:
    """The records of a whole file in memory. Raises AdapterError."""
    length = header_length(memoryview(data), len(data))
    return parse_header(memoryview(data)[LENGTH_BYTES : LENGTH_BYTES + length], len(data))


def read_records(file: BinaryIO, file_bytes: int) -> list[TensorRecord]:
    """The records of an open file, reading its header only. Raises AdapterError."""
    length = header_length(file.read(LENGTH_BYTES), file_bytes)
    return parse_header(file.read(length), file_bytes)


def tensor_view(data: bytearray, record: TensorRecord) -> torch.Tensor:
    """The tensor of `record` as a view of `data`; `record.dtype` must be in TORCH_DTYPES."""
    dtype = TORCH_DTYPES[record.dtype]
    if math.prod(record.shape) == 0:
        return torch.empty(record.shape, dtype=dtype)
    start = record.start
    if start % dtype.itemsize:
        # Legal in the format, not for the CPU's vector loads.
        data, start = data[start : record.end], 0
    return torch.frombuffer(data, dtype=dtype, count=math.prod(record.shape), offset=start).view(record.shape)


def load_json_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object of a bounded size; a repeated key is an error, not the last value. Raises AdapterError."""
    value = _parse_object(text)
    if fault := value_fault(value):
        raise AdapterError(fault)
    return value


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not valid JSON ({str(error)[:300]})") from None
    if not isinstance(value, Mapping):
        raise AdapterError(f"a JSON {type(value).__name__}, not an object")
    return dict(value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"key {brief(twice)} appears twice")
    return entries
