"""Adapters as other programs write them -> a config and tensors in a layout that the reader knows.

Pickles can run code, so `torch.load` gets weights_only and nothing here is used by a server; `flora-vllm convert` is.
"""

import json
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from flora_vllm.errors import AdapterError
from flora_vllm.formats.families.gated import GATE, METEORA
from flora_vllm.formats.families.mixlora import MIXLORA
from flora_vllm.formats.families.mtllora import LAMBDAS, LORA_A, LORA_B, MTLLORA
from flora_vllm.formats.families.table import CONDITIONAL, CONDITIONAL_MARK, REFUSED_VARIANTS
from flora_vllm.formats.files import CONFIG_NAME, SIDECAR_NAME, WEIGHTS_NAME
from flora_vllm.formats.names import PREFIX
from flora_vllm.formats.tensor_file import load_json_object

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

PICKLES = (".bin", ".pt", ".pth")
PICKLED_NAME = "adapter_model.bin"
# What training programs wrap a state dict in.
_WRAPPED_IN = ("state_dict", "module", "model", "model_state_dict")
_RECYCLED = re.compile(r"w_([ab])_(\d+)")
_RECYCLED_HEAD = re.compile(r"fc_\d+in_\d+out")
_OF_METEORA = (f".{GATE}", ".lora_A.weight", ".lora_B.weight")
_OF_MIXLORA = "mixlora."
_FUSED = re.compile(r"\.lora_B_[qkv](_w)?\Z")
# What reading a damaged file, or one with more than tensors, has been seen to raise, and their kin.
_DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
    SafetensorError,
)


@dataclass(frozen=True, eq=False)
class Found:
    """What was in a folder or file. `notes`: what was left out or changed on the way, a line each."""

    config: Config
    tensors: Tensors
    sidecar: Config | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What only the user can tell: MTL-LoRA's and MeteoRA's numbers, and the base model's name for the config."""

    alpha: float | None = None
    temperature: float | None = None
    base_model: str | None = None
    top_k: int | None = None


def find(path: Path, pickled: bool, told: Told) -> Found:
    """The adapter at `path`, a folder or the file of its tensors; a pickle is opened only if `pickled`.

    Raises AdapterError for what cannot be read or is of no layout we know.
    """
    gated = _gates_and_factors(path)
    if gated:
        return _meteora(path, gated, told)
    folder, file = (path, _weights_in(path, pickled)) if path.is_dir() else (path.parent, path)
    if file.suffix in PICKLES and not pickled:
        raise AdapterError(
            f"{file} is a pickle, which can hold code; `flora-vllm convert --pickle` reads its tensors only"
        )
    tensors, notes = load_tensors(file)
    if any(name.endswith(f".{LAMBDAS}") for name in tensors):
        return _mtl_lora(file, tensors, notes, told)
    if any(_RECYCLED.fullmatch(name) for name in tensors):
        return _recycled(file, tensors, notes, told)
    if name := next((name for name in tensors if CONDITIONAL_MARK in name), None):
        reason = REFUSED_VARIANTS[CONDITIONAL]
        raise AdapterError(f"{file}: {name!r} is of {CONDITIONAL}, which is not served: {reason}")
    config = _json(folder / CONFIG_NAME)
    if config is None:
        raise AdapterError(
            f"{folder} has no {CONFIG_NAME} beside {file.name}, and its tensors ({', '.join(list(tensors)[:3])}, …) "
            "are of no layout that does without: MTL-LoRA (lora_lambdas), LoRA Recycle (w_a_000)"
        )
    if config.get("peft_type") == MIXLORA.type_name:
        return _mixlora(config, tensors, notes)
    return Found(config, tensors, _json(folder / SIDECAR_NAME), tuple(notes))


def _weights_in(folder: Path, pickled: bool) -> Path:
    known = [WEIGHTS_NAME, *([PICKLED_NAME] if pickled else [])]
    there = [folder / name for name in known if (folder / name).is_file()]
    others = [entry for entry in sorted(folder.iterdir()) if entry.suffix in (*PICKLES, ".safetensors")]
    if not there and len(others) != 1:
        raise AdapterError(
            f"{folder} holds none of {', '.join(known)}; give the file of the adapter's tensors"
            + (f" ({', '.join(entry.name for entry in others)})" if others else "")
        )
    return (there or others)[0]


def _json(file: Path) -> Config | None:
    if not file.is_file():
        return None
    try:
        return load_json_object(file.read_bytes())
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from None


def load_tensors(file: Path) -> tuple[Tensors, list[str]]:
    """(tensors by name, notes) of a .safetensors file or a pickle, of which nothing is run. Raises AdapterError."""
    if file.suffix not in (*PICKLES, ".safetensors"):
        raise AdapterError(f"{file}: only {', '.join(PICKLES)} and .safetensors are read")
    try:
        if file.suffix == ".safetensors":
            return load_file(file), []
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AdapterError(f"{file} does not exist") from None
    except _DAMAGED as error:
        first = str(error).strip().splitlines()[:1]
        raise AdapterError(
            f"{file}: it holds more than tensors, or is damaged ({''.join(first)[:200]}); nothing in it was run. "
            "Save its state dict alone with torch.save, or as safetensors"
        ) from None
    notes: list[str] = []
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in _unwrapped(file, content, notes)}
    if not tensors:
        raise AdapterError(f"{file}: it holds no tensors")
    return tensors, notes


def _unwrapped(file: Path, content: object, notes: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(content, Mapping):
        raise AdapterError(f"{file}: it holds a {type(content).__name__}, not tensors by name")
    entries: Mapping[Any, Any] = content
    inner = [name for name in _WRAPPED_IN if isinstance(content.get(name), Mapping)]
    if len(inner) == 1:
        left = sorted(str(name) for name in content if name != inner[0])
        if left:
            notes.append(f"left out what lies beside its {inner[0]!r}: {', '.join(left[:10])}")
        entries = content[inner[0]]
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise AdapterError(
                f"{file}: entry {name!r} is a {type(value).__name__}, not a tensor; save the tensors alone"
            )
        yield name, value


def _gates_and_factors(path: Path) -> Tensors:
    """MeteoRA's tensors in the shards of a model, which may be too large to read whole; {} if there are none.

    What is a MeteoRA directory already has a config, and needs nothing taken out of it.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    ours = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if ours.is_file():
        return {}
    found: Tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                names = [name for name in shard.keys() if name.endswith(_OF_METEORA)]  # noqa: SIM118 - it is no dict
                found |= {name: shard.get_tensor(name) for name in names}
        except (*_DAMAGED, OSError) as error:
            raise AdapterError(f"{file} cannot be read: {error}") from None
    return found if any(name.endswith(f".{GATE}") for name in found) else {}


def _meteora(path: Path, tensors: Tensors, told: Told) -> Found:
    """The authors' model with its LoRAs stacked in every adapted layer; α, k and T are their scripts'."""
    missing = [
        f"--{name.replace('_', '-')}" for name in ("alpha", "temperature", "top_k") if getattr(told, name) is None
    ]
    if missing:
        raise AdapterError(
            f"{path} is MeteoRA, whose files leave out what its scripts were told; give {', '.join(missing)} (alpha: "
            "its LoRAs' lora_alpha; temperature 1 and top-k 2 unless changed)"
        )
    renamed = {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    gates = {
        name.removeprefix(PREFIX).removesuffix(f".{GATE}"): t for name, t in renamed.items() if name.endswith(GATE)
    }
    module, gate = next(iter(sorted(gates.items())))
    factor = renamed.get(f"{PREFIX}{module}.lora_A.weight")
    if factor is None:
        raise AdapterError(f"{path}: {module}.lora_A.weight is missing")
    number = len(gate)
    config = {
        "base_model_name_or_path": told.base_model,
        "n_adapters": number,
        "peft_type": METEORA.type_name,
        "r": len(factor) // number,
        "target_modules": sorted(gates),
    }
    sidecar = {"alphas": [told.alpha] * number, "temperature": told.temperature, "top_k": told.top_k}
    note = f"left out the base model beside its gates and factors; alpha {told.alpha} for each of {number} adapters"
    return Found(config, renamed, sidecar, (note,))


def _mtl_lora(file: Path, tensors: Tensors, notes: list[str], told: Told) -> Found:
    """The authors' state dict: names without prefix, sizes in the shapes, two numbers nowhere."""
    missing = [f"--{name}" for name in ("alpha", "temperature") if getattr(told, name) is None]
    if missing:
        raise AdapterError(
            f"{file} is MTL-LoRA, whose file leaves out what its training was told; give {' and '.join(missing)} "
            "(their scripts: --lora_alpha, and --B_scale, 0.1 unless changed)"
        )
    if fused := next((name for name in tensors if _FUSED.search(name)), None):
        raise AdapterError(
            f"{file}: {fused!r} is of MTL-LoRA's fused q, k, v layer, which is not read; train them apart"
        )
    renamed = {PREFIX + name.removeprefix("module.").removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    modules = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in renamed if name.endswith(f".{LAMBDAS}")})
    first = renamed[f"{PREFIX}{modules[0]}.{LAMBDAS}"]
    for part in (LORA_A, LORA_B):
        if f"{PREFIX}{modules[0]}.{part}" not in renamed:
            raise AdapterError(f"{file}: {modules[0]}.{part} is missing")
    config = {
        "base_model_name_or_path": told.base_model,
        "diagonal": first.ndim == 2,
        "n_tasks": first.shape[0],
        "peft_type": MTLLORA.type_name,
        "r": renamed[f"{PREFIX}{modules[0]}.{LORA_A}"].shape[1],
        "target_modules": modules,
    }
    return Found(config, renamed, {"alpha": told.alpha, "temperature": told.temperature}, tuple(notes))


def _mixlora(config: Config, tensors: Tensors, notes: list[str]) -> Found:
    """TUDB-Labs' MixLoRA: names from the layers on, targets a list or a switch for each name."""
    renamed = {
        f"{PREFIX}model.{name.removeprefix(_OF_MIXLORA)}" if name.startswith(_OF_MIXLORA) else name: tensor
        for name, tensor in tensors.items()
    }
    targets = config.get("target_modules")
    if isinstance(targets, dict):
        targets = sorted(name for name, is_on in targets.items() if is_on)
    if renamed.keys() != tensors.keys():
        notes.append(f"{_OF_MIXLORA} is {PREFIX}model. now, where PEFT has an adapter's layers")
    return Found({**config, "target_modules": targets}, renamed, None, tuple(notes))


def _recycled(file: Path, tensors: Tensors, notes: list[str], told: Told) -> Found:
    """LoRA Recycle: in CLIP's vision tower number n is of layer n // 2, its q if even, its v if odd; scale 1."""
    renamed: Tensors = {}
    modules: dict[str, int] = {}
    for name, tensor in tensors.items():
        found = _RECYCLED.fullmatch(name)
        if found is None:
            if not _RECYCLED_HEAD.fullmatch(name):
                raise AdapterError(f"{file}: tensor {name!r} is none of LoRA Recycle's (w_a_…, w_b_…, fc_…in_…out)")
            notes.append(f"left out {name}, the head of its own few-shot task; it adapts nothing of the model")
            continue
        number = int(found[2])
        module = f"vision_model.encoder.layers.{number // 2}.self_attn.{'qv'[number % 2]}_proj"
        renamed[f"{PREFIX}{module}.lora_{found[1].upper()}.weight"] = tensor
        modules[module] = tensor.shape[0] if found[1] == "a" else modules.get(module, 0)
    rank = max(modules.values())
    notes.append(f"{len(modules)} modules are named as in transformers' CLIP, scale 1")
    config = {
        "base_model_name_or_path": told.base_model,
        "lora_alpha": rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(modules),
    }
    return Found(config, renamed, None, tuple(notes))


def as_json(value: Config) -> bytearray:
    return bytearray(json.dumps(value, indent=2, sort_keys=True).encode())
