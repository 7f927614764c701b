"""`flora-vllm inspect DIR --plot`: how large the adapter is in each layer and module, and what its rank is used for."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_vllm.errors import ConfigError


@dataclass(frozen=True)
class Size:
    """One adapted module. norm: of its change, see `NORMS`. spectrum: singular values, largest first; () without."""

    layer: int
    module: str
    norm: float
    spectrum: tuple[float, ...]


# What is drawn as a module's size, by family; every other family shows the norm of its tensors.
NORMS = {"FLORA": "rms of c B A - 1, the relative change of a weight", "LORA": "Frobenius norm of s B A"}
OTHERS = "norm of the module's tensors"


def draw(directory: Path, out: Path) -> Path:
    """Write the picture to `out` (any format matplotlib knows).

    Raises ConfigError without matplotlib, and if it can't write `out`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    sizes = measure(config, directory / "adapter_model.safetensors")
    modules = sorted({size.module for size in sizes})
    layers = sorted({size.layer for size in sizes})
    spectra = [size for size in sizes if len(size.spectrum) > 1]
    figure = Figure(figsize=(9, 2.2 + 0.3 * len(modules) + (2.6 if spectra else 0)), layout="constrained")
    axes: Any = figure.subplots(2 if spectra else 1, 1, squeeze=False)[:, 0]
    table = [[math.nan] * len(layers) for _ in modules]
    for size in sizes:
        table[modules.index(size.module)][layers.index(size.layer)] = size.norm
    image = axes[0].imshow(table, aspect="auto", cmap="viridis")
    axes[0].set_yticks(range(len(modules)), modules)
    axes[0].set_xticks(range(len(layers)), layers)
    axes[0].set_xlabel("layer")
    axes[0].set_title(f"{directory.resolve().name} ({config.get('peft_type')}): {_norm_of(config)}")
    figure.colorbar(image, ax=axes[0])
    if spectra:
        _draw_spectra(axes[1], modules, spectra)
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a format that it does not know
        raise ConfigError(f"--plot {out} can't be drawn: {error}") from error
    return out


def _draw_spectra(axis: Any, modules: list[str], spectra: list[Size]) -> None:
    for module in modules:
        rows = [size.spectrum for size in spectra if size.module == module and size.spectrum[0] > 0]
        if not rows:
            continue
        longest = max(map(len, rows))
        shares = [[row[i] / row[0] for row in rows if i < len(row)] for i in range(longest)]
        medians = [sorted(share)[len(share) // 2] for share in shares]
        axis.plot(range(1, longest + 1), medians, marker="o", label=module)
    axis.set_xlabel("singular value of the change")
    axis.set_ylabel("share of the largest\n(median of the layers)")
    axis.set_ylim(0, 1.05)
    axis.legend(fontsize="small", ncols=4)


def _norm_of(config: Mapping[str, Any]) -> str:
    return NORMS.get(config.get("peft_type", ""), OTHERS)


def measure(config: Mapping[str, Any], weights: Path) -> list[Size]:
    """The size of every module in a checkpoint's tensors; layer -1 for a module outside numbered layers."""
    from safetensors.torch import load_file

    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(weights).items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        modules.setdefault(path.removeprefix("base_model.model."), {})[part] = tensor.double()
    return [_size(path, parts, config) for path, parts in sorted(modules.items())]


def _size(path: str, parts: Mapping[str, Any], config: Mapping[str, Any]) -> Size:
    import torch

    from flora_vllm.formats.matching import match_pattern

    number = re.search(r"\.(\d+)\.", path)
    layer, module = int(number[1]) if number else -1, path.rpartition(".")[2]
    down = next((t for n, t in parts.items() if n.endswith("_A") and t.ndim == 2), None)
    up = next((t for n, t in parts.items() if n.endswith("_B") and t.ndim == 2), None)
    family = config.get("peft_type")
    if family not in NORMS or down is None or up is None or up.shape[1] != down.shape[0]:
        return Size(layer, module, math.sqrt(sum(float(t.square().sum()) for t in parts.values())), ())
    rank = down.shape[0]
    if family == "FLORA":
        # c B A - 1 has one more singular value: the ones are a row and a column of their own.
        up = up / rank if config.get("reduction", "mean") == "mean" else up
        up = torch.cat([up, -torch.ones(len(up), 1, dtype=up.dtype)], 1)
        down = torch.cat([down, torch.ones(1, down.shape[1], dtype=down.dtype)], 0)
    else:
        alpha = match_pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", rank))
        up = up * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    # The singular values of B A are those of the product of the two triangles, which is small.
    spectrum = torch.linalg.svdvals(torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T)
    norm = float(spectrum.square().sum().sqrt())
    norm /= math.sqrt(up.shape[0] * down.shape[1]) if family == "FLORA" else 1
    return Size(layer, module, norm, tuple(spectrum.tolist()))
