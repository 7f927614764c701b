"""The two plots of the serving experiment: throughput against rank, latency against request rate."""

from collections.abc import Sequence
from pathlib import Path

from figure import drawn, legend_outside
from matplotlib.ticker import LogLocator

LABELS = {
    "vllm": "plain vLLM",
    "base_only": "base traffic, plugin on",
    "vllm_lora_r8": "LoRA rank 8, vLLM's own",
    "lora_r8": "LoRA rank 8, plugin",
    "flora_r1": "FLoRA rank 1",
    "flora_r8": "FLoRA rank 8",
    "mix": "FLoRA and LoRA rank 8, half each",
}
LINES = ("vllm", "base_only", "lora_r8", "vllm_lora_r8", "mix")


def plot(rows: Sequence[dict], folder: Path) -> None:
    """Write serving_throughput.png and serving_latency.png into `folder`."""
    _throughput([row for row in rows if row["kind"] == "throughput"], folder / "serving_throughput.png")
    latencies = [row for row in rows if row["kind"] == "latency"]
    if latencies:
        _latency(latencies, folder / "serving_latency.png")


def _throughput(rows: Sequence[dict], file: Path) -> None:
    rates = {row["traffic"]: row["tokens_per_s"]["median"] for row in rows}
    with drawn(file, height=6.5) as (axes,):
        for suffix, label in (("", "FLoRA, Zipf"), ("_uniform", "FLoRA, uniform")):
            points = sorted(
                (int(name.removeprefix("flora_r").removesuffix(suffix)), rate)
                for name, rate in rates.items()
                if name.startswith("flora_r") and name.endswith("_uniform") == bool(suffix)
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        for i, name in enumerate(LINES):
            axes.axhline(rates[name], linestyle="--", color=f"C{i + 2}", label=LABELS[name])
        axes.set(xlabel="rank of FLoRA", ylabel="output tokens per second", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        legend_outside(axes)


def _latency(rows: Sequence[dict], file: Path) -> None:
    with drawn(file, width=12, height=6, panels=2) as panels:
        for axes, quantity, title in zip(
            panels, ("first_token_s", "per_token_s"), ("time to first token", "time per output token"), strict=True
        ):
            for i, traffic in enumerate(dict.fromkeys(row["traffic"] for row in rows)):
                own = [row for row in rows if row["traffic"] == traffic]
                x = [row["rate_per_s"] for row in own]
                label = LABELS.get(traffic, traffic)
                axes.plot(x, [row[f"{quantity}_p50"] * 1e3 for row in own], marker="o", color=f"C{i}", label=label)
                axes.plot(x, [row[f"{quantity}_p99"] * 1e3 for row in own], linestyle=":", color=f"C{i}")
            axes.set(xlabel="requests per second", ylabel="milliseconds", yscale="log")
            axes.set_title(f"{title}: p50, dots p99")
            # Powers of ten alone leave an axis of less than a decade without a figure.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        legend_outside(panels[0])
