"""What a run leaves on disk: the adapter, published whole, and beside it what is needed to go on.

    OUT/             adapter_config.json, adapter_model.safetensors: what the server loads
    OUT.training/    state.pt (factors in float32, optimizer, step), log.jsonl; removed by nobody, resumes the run

Every write goes to a new file first and is renamed: a full disk or a kill leaves the last good version.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save

from flora_vllm.errors import ConfigError
from flora_vllm.training.config import FloraConfig

STATE_NAME = "state.pt"
LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class Settings:
    """What makes a run what it is. A run may be resumed with another rate (after it diverged), with nothing else."""

    base: str
    method: str
    rank: int
    targets: str | None
    data: str
    tokens: int  # in the training blocks; notices changed data
    length: int
    batch: int
    steps: int
    rate: float
    seed: int


def training_directory(out: Path) -> Path:
    return out.with_name(out.name + ".training")


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one rename, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def save_state(out: Path, settings: Settings, state: Mapping[str, Any]) -> None:
    """Keep `state` (tensors and plain values: "step", "factors", "optimizer") so that the run can go on from it."""
    buffer = io.BytesIO()
    torch.save({"settings": asdict(settings), **state}, buffer)
    write_whole(training_directory(out) / STATE_NAME, buffer.getvalue())


def load_state(out: Path, settings: Settings) -> dict[str, Any] | None:
    """The state to go on from, or None if there is none.

    Raises ConfigError if the state belongs to other settings, naming those that differ, or can't be read.
    """
    path = training_directory(out) / STATE_NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error}); start again with --restart") from None
    except (RuntimeError, LookupError, EOFError, ValueError, TypeError, AttributeError, UnpicklingError) as error:
        # By its kind alone: torch's own words advise to load without the check that keeps pickles from running code.
        raise ConfigError(f"{path} can't be read ({type(error).__name__}); start again with --restart") from None
    before = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(before, dict) or not {"step", "factors", "optimizer"} <= state.keys():
        raise ConfigError(f"{path} can't be read (it holds no run); start again with --restart")
    now = {k: v for k, v in asdict(settings).items() if k != "rate"}
    differing = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v]
    if differing:
        raise ConfigError(
            f"{out} holds a run with other settings ({'; '.join(differing)}): "
            "use the same to go on, another OUT, or --restart to begin anew"
        )
    return state


def forget(out: Path) -> None:
    """Remove what an earlier run left. Raises OSError if it cannot be removed."""
    if training_directory(out).exists():
        shutil.rmtree(training_directory(out))


def log_row(out: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line to the run's log."""
    path = training_directory(out) / LOG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def check_out(out: Path) -> None:
    """Raises AdapterError if `publish_adapter` would, long before there is an adapter."""
    from flora_vllm.formats.card import CARD_NAME
    from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
    from flora_vllm.formats.out import replaceable

    replaceable(out, (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME))


def publish_adapter(model: PeftModel, out: Path, adapter_name: str, dtype: torch.dtype, base: str) -> None:
    """Write the adapter as the server reads it: PEFT's own names and config, factors in `dtype`.

    Raises AdapterError if OUT holds anything but an earlier version (`check_out`).
    """
    from flora_vllm.formats.card import CARD_NAME, card_for, card_without_flora
    from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
    from flora_vllm.formats.writer import publish

    config = model.peft_config[adapter_name]
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in sorted(tensors.items())}
    values = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base}
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    content = {
        CONFIG_NAME: bytearray(json.dumps(values, indent=2, sort_keys=True).encode()),
        WEIGHTS_NAME: bytearray(save(tensors, metadata={"format": "pt"})),
    }
    if isinstance(config, FloraConfig):
        content[CARD_NAME] = card_for(out, base, max(config.r, *config.rank_pattern.values(), 1))
    elif card := card_without_flora(out):
        content[CARD_NAME] = card
    publish(out, content, without=(CARD_NAME,))
