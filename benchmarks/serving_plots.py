"""The two plots of the serving experiment: throughput against rank, latency against request rate."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(rows: Sequence[dict], folder: Path) -> None:
    """Write serving_throughput.png and serving_latency.png into `folder`."""
    _throughput([row for row in rows if row["kind"] == "throughput"], folder / "serving_throughput.png")
    latencies = [row for row in rows if row["kind"] == "latency"]
    if latencies:
        _latency(latencies, folder / "serving_latency.png")


def _throughput(rows: Sequence[dict], file: Path) -> None:
    rates = {row["traffic"]: row["tokens_per_s"]["median"] for row in rows}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for suffix, label in (("", "FLoRA, Zipf"), ("_uniform", "FLoRA, uniform")):
        points = sorted(
            (int(name.removeprefix("flora_r").removesuffix(suffix)), rate)
            for name, rate in rates.items()
            if name.startswith("flora_r") and name.endswith("_uniform") == bool(suffix)
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    lines = {
        "vllm": "plain vLLM",
        "base_only": "base traffic, plugin on",
        "lora_r8": "LoRA rank 8, plugin",
        "vllm_lora_r8": "LoRA rank 8, vLLM's own",
        "mix": "FLoRA and LoRA rank 8, half each",
    }
    for i, (name, label) in enumerate(lines.items()):
        axes.axhline(rates[name], linestyle="--", color=f"C{i + 2}", label=label)
    axes.set(xscale="log", xlabel="rank", ylabel="output tokens per second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _latency(rows: Sequence[dict], file: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, quantity, title in zip(
        panels, ("first_token_s", "per_token_s"), ("time to first token", "time per output token"), strict=True
    ):
        for i, traffic in enumerate(dict.fromkeys(row["traffic"] for row in rows)):
            own = [row for row in rows if row["traffic"] == traffic]
            x = [row["rate_per_s"] for row in own]
            axes.plot(x, [row[f"{quantity}_p50"] for row in own], marker="o", color=f"C{i}", label=traffic)
            axes.plot(x, [row[f"{quantity}_p99"] for row in own], linestyle=":", color=f"C{i}")
        axes.set(xlabel="requests per second", ylabel="seconds", title=f"{title} (line p50, dots p99)", yscale="log")
    panels[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
