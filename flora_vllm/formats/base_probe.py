"""What terms may ask of a base model that lies in files (`terms.Probe`)."""

from collections.abc import Mapping
from functools import cached_property

import torch

from flora_vllm.formats.base_model import BaseModel
from flora_vllm.formats.model_order import modules_in_order
from flora_vllm.formats.tensor_file import TORCH_DTYPES, TensorRecord, tensor_view


class FileProbe:
    """One module of `base`; its weight is read when something asks for it, and kept as long as this is."""

    def __init__(self, base: BaseModel, module: str) -> None:
        self.module = module
        self._base = base
        self._name = base.rename(module)

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        return modules_in_order(self._base.directory)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._base.records[f"{self._name}.weight"].shape
        return (columns, rows) if self._base.stores_in_out else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self._base.records[f"{self._name}.weight"].dtype]

    @property
    def stores_in_out(self) -> bool:
        return self._base.stores_in_out

    def product(self, x_NI: torch.Tensor) -> torch.Tensor:
        return x_NI.float() @ self._float_weight.T

    def squared_row_norms(self) -> torch.Tensor:
        return self._float_weight.square().sum(1)

    def weight(self) -> torch.Tensor:
        return self._float_weight

    def bias(self) -> torch.Tensor | None:
        name = f"{self._name}.bias"
        return self._read(name).float() if name in self._base.records else None

    @cached_property
    def _float_weight(self) -> torch.Tensor:
        weight = self._read(f"{self._name}.weight").float()
        return weight.T.contiguous() if self._base.stores_in_out else weight

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(self._base, name)


def read_tensor(base: BaseModel, name: str) -> torch.Tensor:
    """One of the tensors that `base.records` lists, as its file has it."""
    record = base.records[name]
    file = next(file for file, records in base.files.items() if record in records)
    with (base.directory / file).open("rb") as source:
        source.seek(record.start)
        data = bytearray(source.read(record.end - record.start))
    return tensor_view(data, TensorRecord(name, record.dtype, record.shape, 0, len(data)))
