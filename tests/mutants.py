"""An adapter's two files changed at random, as accidents, other versions of PEFT, and ill will would change them."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a key of any type may be given, wrong types and sizes among it.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, 10**30, 0.0, 0.5, -2.5, 1e-30, 1e30, 1e308, "", "none", "all",
    "lora_only", "q_proj", ".*", "(", "true", "1", [], {}, [0], [1], [1, 0], ["q_proj"], ["v_proj", "q_proj"], [None],
    [[]], {"q_proj": 2}, {"v_proj": 0.5}, {"q_proj": "a"}, {"(": 1}, {".*": 3}, {"": 1}, {"a": {"b": [1]}},
)  # fmt: skip
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0, 1e-40, 1e4, 3e38)
_NAME_PARTS = (
    "base_model.",
    "model.",
    "default.",
    "weight",
    "0",
    "1",
    "7",
    "A",
    "B",
    "lora_",
    "\n",
    "é",
    ".",
    "x" * 700,
)


def mutate(folder: Path, known_keys: list[str], random: Random) -> str:
    """Change the adapter in `folder` once or twice; what was done, in words. `known_keys`: of its family's row."""
    done = []
    for _ in range(random.choice((1, 1, 1, 2))):
        kind = random.choice((_config, _config, _config, _tensor, _tensor, _tensor, _name, _name, _bytes))
        try:
            done.append(kind(folder, known_keys, random))
        except (ValueError, IndexError, RuntimeError, SafetensorError) as error:
            # The first change left nothing of this kind to change.
            done.append(f"nothing ({type(error).__name__})")
    return "; ".join(done)


def _config(folder: Path, known_keys: list[str], random: Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    key = random.choice([*config, *config, *known_keys, "made_up", "use_dora", "alpha_pattern", "bias"])
    action = random.choice(("remove", "value", "value", "like", "like"))
    if action == "remove":
        config.pop(key, None)
    elif action == "value" or key not in config:
        config[key] = random.choice(VALUES)
    else:
        config[key] = _like(config[key], random)
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{CONFIG}: {key} is {config.get(key, 'gone')!r}"


def _like(value: Any, random: Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, 2 * value, -value, value // 2))
    if isinstance(value, float):
        return random.choice((value + 1, 2 * value, -value, value / 3))
    if isinstance(value, str):
        return random.choice((value + "x", value[1:], value.upper(), f"({value})", value[::-1]))
    if isinstance(value, list):
        return random.choice((value[1:], value * 2, value[::-1], [*value, "k_proj"], [*value, *value[:1]]))
    if isinstance(value, dict):
        return random.choice(({}, {**value, "q_proj": 1}, dict(list(value.items())[1:])))
    return random.choice(VALUES)


def _tensor(folder: Path, known_keys: list[str], random: Random) -> str:
    tensors = load((folder / WEIGHTS).read_bytes())
    name = random.choice(sorted(tensors))
    old = tensors[name]
    action = random.choice((
        "transposed", "longer", "shorter", "flat", "cut", "deeper", "empty", "scalar", "dtype", "number", "scaled",
        "scaled", "zero", "shuffled", "swapped", "rounded",
    ))  # fmt: skip
    match action:
        case "transposed":
            new = old.transpose(0, -1)
        case "longer":
            axis = random.randrange(old.ndim)
            new = torch.cat([old, old.narrow(axis, 0, 1)], axis)
        case "shorter":
            axis = random.randrange(old.ndim)
            new = old.narrow(axis, 0, old.shape[axis] - 1)
        case "flat":
            new = old.flatten()
        case "cut":
            new = old.reshape(2, -1) if random.random() < 0.5 else old.reshape(-1, 2)
        case "deeper":
            new = old[None] if random.random() < 0.5 else old[..., None]
        case "empty":
            new = old[:0]
        case "scalar":
            new = old.flatten()[0]
        case "dtype":
            new = old.to(random.choice(DTYPES))
        case "number":
            new = old.clone()
            new.view(-1)[random.randrange(old.numel())] = random.choice(NUMBERS)
        case "scaled":
            new = old * random.choice((-1, 2, 3, 0.5))
        case "zero":
            new = torch.zeros_like(old)
        case "shuffled":
            new = old.flatten()[torch.randperm(old.numel())].view(old.shape)
        case "swapped":
            other = random.choice(sorted(tensors))
            new, tensors[other] = tensors[other], old
        case _:
            new = old.to(torch.bfloat16).to(old.dtype)
    tensors[name] = new
    _write(folder, tensors)
    return f"{name} is {action} ({old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)})"


def _name(folder: Path, known_keys: list[str], random: Random) -> str:
    tensors = load((folder / WEIGHTS).read_bytes())
    name = random.choice(sorted(tensors))
    action = random.choice(("gone", "renamed", "twice", "other layer", "other module", "part"))
    tensor = tensors[name] if action == "twice" else tensors.pop(name)
    at, part = random.randrange(len(name)), random.choice(_NAME_PARTS)
    new = {
        "renamed": name[:at] + part + name[at + random.choice((0, 1)) :],
        "twice": name[:at] + part + name[at:],
        "other layer": name.replace("layers.0", "layers.1") if "layers.0" in name else name.replace("1", "9"),
        "other module": name.replace("q_proj", "k_proj") if "q_proj" in name else name.replace("v_proj", "q_proj"),
        "part": name.replace("_A", "_B") if "_A" in name else name.replace("_B", "_A"),
    }.get(action)
    if new is not None:
        tensors[new] = tensor
    _write(folder, tensors)
    return f"{name} is {action}" + ("" if new is None else f": {new[:120]!r}")


def _bytes(folder: Path, known_keys: list[str], random: Random) -> str:
    file = folder / random.choice((CONFIG, WEIGHTS, WEIGHTS))
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if file.name == WEIGHTS else len(data)
    # As often in the header as in the numbers.
    at = random.randrange(min(header, len(data)) if random.random() < 0.5 else len(data))
    action = random.choice(("bit", "bit", "bit", "byte", "cut", "twice", "short", "long", "length"))
    match action:
        case "bit":
            data[at] ^= 1 << random.randrange(8)
        case "byte":
            data[at] = random.randrange(256)
        case "cut":
            del data[at : at + random.randrange(1, 64)]
        case "twice":
            data[at:at] = data[at : at + random.randrange(1, 64)]
        case "short":
            del data[at:]
        case "long":
            data += bytes(random.randrange(1, 64))
        case "length":
            data[:8] = random.choice((0, 1, header, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    file.write_bytes(data)
    return f"{file.name}: {action} at {at}"


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Tensors that share memory cannot be saved.
    (folder / WEIGHTS).write_bytes(save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}))
