"""The plot of what a step costs with each family, beside the rival that would serve it: the step without adapters."""

from collections.abc import Mapping
from pathlib import Path

from figure import drawn

LABELS = {
    "ia3": "IA3",
    "road": "RoAd",
    "lora_r8": "LoRA, rank 8",
    "dora_r8": "DoRA, rank 8",
    "oft_b32": "OFT, blocks of 32",
    "hira_r8_on_8": "HiRA, rank 8, 8 adapters",
    "hira_r8": "HiRA, rank 8",
    "vera_r256": "VeRA, rank 256",
    "fourierft_n1000": "FourierFT, 1000 entries",
    "flora_r1": "FLoRA, rank 1",
    "flora_r4": "FLoRA, rank 4",
    "flora_r8": "FLoRA, rank 8",
    "flora_r16": "FLoRA, rank 16",
}


def plot(row: Mapping[str, float], folder: Path) -> None:
    """Write ops_families.png into `folder` from the summary row of `bench_ops.py --families`."""
    costs = {label: row[f"{name}_vs_base"] for name, label in LABELS.items() if f"{name}_vs_base" in row}
    floors = {label: row[f"{name}_floor_vs_base"] for name, label in LABELS.items() if f"{name}_floor_vs_base" in row}
    names = sorted(costs, key=costs.__getitem__, reverse=True)
    with drawn(folder / "ops_families.png", height=6) as (axes,):
        bars = axes.barh(names, [costs[name] for name in names], color="C0")
        axes.bar_label(bars, fmt=" %.2f")
        axes.plot(list(floors.values()), list(floors), "|", color="black", markersize=22, label="no less is possible")
        axes.axvline(1, color="C3", linestyle="--", label="without adapters")
        axes.set(xscale="log", xlim=(0.8, 40), xlabel="time of one step, of the step without adapters")
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper right")
