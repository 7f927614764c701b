"""Modules' FLoRA factors -> a directory as contract C1 describes it, published in one rename."""

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.card import CARD_NAME, card_for
from flora_vllm.formats.families.flora import FLORA_A, FLORA_B
from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
from flora_vllm.formats.names import PREFIX
from flora_vllm.formats.out import replaceable
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files


def write_flora(
    path: str | os.PathLike[str],
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    reduction: str = "mean",
    base_model: str | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Path:
    """Write `module path -> (flora_A (r, in), flora_B (out, r))` as a FLoRA adapter directory at `path`.

    `target_modules` defaults to the exact paths; ranks that differ go into `rank_pattern`. An adapter that is
    already there is replaced; readers see the old one or the new one. Returns the path.
    Raises AdapterError if the result could not be read back, or if the directory holds anything else.
    """
    if not modules:
        raise AdapterError(f"adapter {os.fspath(path)}: no modules to write")
    ranks = {module: a.shape[0] if a.ndim else 0 for module, (a, _) in modules.items()}
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    config = {
        "base_model_name_or_path": base_model,
        "peft_type": "FLORA",
        "r": rank,
        "rank_pattern": {f"^{re.escape(module)}": r for module, r in sorted(ranks.items()) if r != rank},
        "reduction": reduction,
        "target_modules": target_modules
        if isinstance(target_modules, str)
        else sorted(modules if target_modules is None else target_modules),
    }
    tensors = {
        f"{PREFIX}{module}.{part}": tensor.detach().cpu().contiguous()
        for module, pair in modules.items()
        for part, tensor in zip((FLORA_A, FLORA_B), pair, strict=True)
    }
    files = {
        CONFIG_NAME: bytearray(json.dumps(config, indent=2, sort_keys=True).encode()),
        WEIGHTS_NAME: bytearray(save(tensors, metadata={"format": "pt"})),
    }
    faults = examine_files(files, None, Limits()).faults
    if faults:
        raise adapter_error(os.fspath(path), faults)
    publish(Path(path), {**files, CARD_NAME: card_for(path, base_model, max(ranks.values()))})
    return Path(path)


def publish(path: Path, files: Mapping[str, bytearray], without: Collection[str] = ()) -> None:
    """Make `path`, or what it links to, a directory of exactly `files`, complete at every moment it can be opened.

    Raises AdapterError if it is there and holds anything but earlier versions of these files, or of those named in
    `without`, which may go.
    """
    path = replaceable(path, [*files, *without])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, stale = (path.parent / f".{path.name}.{kind}-{secrets.token_hex(4)}" for kind in ("new", "old"))
    fresh.mkdir()
    try:
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        if path.exists():
            path.rename(stale)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
