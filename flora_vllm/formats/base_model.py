"""A base model's directory as we need it: its safetensors files, their headers, its linear layers.

Only headers are read here; no weight is loaded. transformers is not needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flora_vllm.adapter import ExpertsLayout, ModelLayout
from flora_vllm.errors import AdapterError
from flora_vllm.formats.matching import OUTPUT_LAYERS
from flora_vllm.formats.tensor_file import TensorRecord, load_json_object, read_records

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Architectures whose linear layers are transformers' Conv1D: the weight is stored (I, O).
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# Embeddings by the last part of their paths: their weights are (tokens, width).
EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "word_embeddings"})
# What serving needs beside the weights; other weight files would bring the unmerged weights along.
SIDE_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
# A layer, what holds its experts, and what is one of them or all.
_OF_EXPERTS = re.compile(r"(.+)\.([^.]+)(?=\.experts(?:\.|$))")
_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_DOWNLOAD = ("*.safetensors", *(f"*{suffix}" for suffix in SIDE_SUFFIXES), "LICENSE*")


def is_conv1d(model_type: object, module: str) -> bool:
    """Whether a model of this type keeps the weight of its linear layer `module` as (I, O)."""
    return model_type in CONV1D_MODEL_TYPES and module.rpartition(".")[2] not in {*OUTPUT_LAYERS, *EMBEDDINGS}


@dataclass(frozen=True)
class BaseModel:
    """`files`: weight file name -> its tensors; `stores_in_out`: linear weights are (I, O), not (O, I).

    `is_tied`: the output layer's weight is, or may be, the embedding's.
    """

    directory: Path
    files: Mapping[str, tuple[TensorRecord, ...]]
    stores_in_out: bool
    is_tied: bool = False

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        """All tensors by name."""
        return {record.name: record for records in self.files.values() for record in records}

    def rename(self, module: str) -> str:
        """`module` as the files call it: a checkpoint saved without its head says `h.0.…` for `transformer.h.0.…`."""
        first, _, rest = module.partition(".")
        is_there = not rest or any(name.startswith(f"{first}.") for name in self.records)
        name = module if is_there else rest
        found = _OF_EXPERTS.match(name)
        return name if found is None else self._hosts.get(found[1], f"{found[1]}.{found[2]}") + name[found.end(2) :]

    @cached_property
    def _hosts(self) -> dict[str, str]:
        """Layer -> what holds its experts in the files (`block_sparse_moe`), where transformers says `mlp`."""
        found = (_OF_EXPERTS.match(name) for name in self.records)
        return {place[1]: f"{place[1]}.{place[2]}" for place in found if place is not None}


def find_base(base: str) -> Path:
    """The directory of `base`: itself, or the snapshot of a hub id. Raises AdapterError if there is neither."""
    path = Path(base)
    if path.is_dir():
        return path
    if path.exists() or base.startswith((".", "/", "~")):
        raise AdapterError(f"base model {base}: not a directory; give a model directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=list(_DOWNLOAD)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"base model {base}: neither a directory nor a model of the hub ({error})") from None


def open_base(base: str) -> BaseModel:
    """Read the headers of `base` (a directory or hub id). Raises AdapterError naming what cannot be used."""
    directory = find_base(base)
    config = _read_object(directory / "config.json")
    if config.get("quantization_config"):
        raise AdapterError(f"base model {directory}: its weights are quantised; merging needs the float checkpoint")
    files = {name: tuple(_records_of(directory / name)) for name in _weight_names(directory)}
    stores_in_out = config.get("model_type") in CONV1D_MODEL_TYPES
    # Where the config says nothing it depends on the architecture; those with Conv1D are.
    is_tied = stores_in_out or config.get("tie_word_embeddings") is not False
    return BaseModel(directory, files, stores_in_out, is_tied)


def base_layout(base: BaseModel) -> ModelLayout:
    """Shapes (O, I) of every two-dimensional weight, keyed by module path; of embeddings (tokens, width); and norms.

    An output layer whose weight the files leave to the embedding is there, too. Modules that cannot be adapted are
    refused by the reader, by name.
    """
    shapes: dict[str, tuple[int, int]] = {}
    norms: frozenset[str] = frozenset()
    for name, record in base.records.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(record.shape) == 2:
            rows, columns = record.shape
            is_conv1d = base.stores_in_out and module.split(".")[-1] not in {"lm_head", *EMBEDDINGS}
            shapes[module] = (columns, rows) if is_conv1d else (rows, columns)
        elif kind == "weight" and len(record.shape) == 1:
            norms |= {module}
            shapes[module] = (*record.shape, *record.shape)
    embeddings = frozenset(module for module in shapes if module.split(".")[-1] in EMBEDDINGS)
    tied = {}
    if base.is_tied and len(embeddings) == 1:
        shapes.setdefault("lm_head", shapes[min(embeddings)])
        tied = {min(embeddings): "lm_head"}
    return ModelLayout(
        shapes, rename=base.rename, experts=_experts(shapes), embeddings=embeddings, tied=tied, norms=norms
    )


def tied_fault(base: BaseModel, module: str) -> str | None:
    """Why the weight of `module` cannot be changed in the files; None if it can."""
    if base.is_tied and module.split(".")[-1] in {"lm_head", *EMBEDDINGS}:
        return (
            f"module {module!r} shares its weight (tie_word_embeddings is not false in the base model's config.json), "
            "so that no file can hold the change of one of the two; serve the adapter as it is"
        )
    return None


def _experts(shapes: Mapping[str, tuple[int, int]]) -> dict[str, ExpertsLayout]:
    """The experts that the files hold as modules of their own."""
    numbers: dict[str, set[int]] = {}
    for path in shapes:
        head, number = path.rpartition(".")[0].rpartition(".")[::2]
        if number.isdecimal() and head.endswith(".experts"):
            numbers.setdefault(head, set()).add(int(number))
    found = {}
    for path, known in numbers.items():
        for names in _EXPERT_NAMES:
            if all(f"{path}.{number}.{name}" in shapes for number in range(len(known)) for name in names):
                found[path] = ExpertsLayout(len(known), *names)
    return found


def _weight_names(directory: Path) -> list[str]:
    if (directory / INDEX_NAME).is_file():
        names = _read_object(directory / INDEX_NAME).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
            raise AdapterError(f"base model {directory}: {INDEX_NAME} has no usable weight_map")
        return sorted(set(names.values()))
    if (directory / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    raise AdapterError(
        f"base model {directory}: neither {SINGLE_NAME} nor {INDEX_NAME}; only safetensors is read "
        "(transformers: save_pretrained writes it)"
    )


def _records_of(path: Path) -> list[TensorRecord]:
    try:
        with path.open("rb") as file:
            return read_records(file, path.stat().st_size)
    except OSError as error:
        raise AdapterError(f"base model file {path}: cannot be read ({error.strerror})") from None
    except AdapterError as error:
        raise AdapterError(f"base model file {path}: {error}") from None


def _read_object(path: Path) -> dict:
    try:
        return load_json_object(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"base model file {path}: cannot be read ({error.strerror})") from None
    except AdapterError as error:
        raise AdapterError(f"base model file {path}: {error}") from None
