"""Plots of the replay: hit rate and p99 wait against time, through the shift of traffic at half time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cluster_replay import Outcome, Traffic
from figure import drawn, legend_outside

WINDOW_S = 4.0
LABELS = {
    "ours": "flora-vllm",
    "stock": "Ray Serve's multiplexing",
    "round_robin": "round robin",
    "hash": "consistent hashing",
    "hash_bounded": "consistent hashing, bounded loads",
    "punica": "Punica's consolidation",
}


def plot_shift(traffic: Traffic, outcomes: Mapping[str, Outcome], folder: Path) -> None:
    """Write cluster_hit_rate.png and cluster_p99_wait.png into `folder`."""
    windows = np.floor(traffic.times_s / WINDOW_S).astype(int)
    edges = np.searchsorted(windows, np.arange(windows[-1] + 1))
    middle = (np.arange(len(edges)) + 0.5) * WINDOW_S
    title = f"{traffic.replicas:,} replicas, {traffic.adapters:,} adapters, {len(traffic.times_s):,} requests"
    for file, label, scale, of in (
        ("cluster_hit_rate.png", f"hit rate in {WINDOW_S:.0f} s", "linear", lambda o, s: o.hit[s].mean()),
        ("cluster_p99_wait.png", f"p99 wait in {WINDOW_S:.0f} s, seconds", "log", lambda o, s: _p99(o.wait_s[s])),
    ):
        with drawn(folder / file, height=6.5) as (axes,):
            for name, outcome in outcomes.items():
                slices = [slice(a, b) for a, b in zip(edges, [*edges[1:], len(windows)], strict=True)]
                values = [of(outcome, s) for s in slices]
                # Dashes show the line below where two policies do the same.
                style = "--" if name in ("hash", "punica") else "-"
                axes.plot(middle, values, style, label=LABELS[name], linewidth=3.5 if name == "ours" else 1.8)
            axes.axvline(traffic.shift_s, color="grey", linestyle=":", label="popularity changes")
            axes.set(xlabel="seconds", ylabel=label, yscale=scale, title=title)
            legend_outside(axes)


def _p99(wait_s: np.ndarray) -> float:
    # A log axis has no zero; below a hundredth of a second nobody waits.
    return max(0.01, float(np.percentile(wait_s, 99)))
