"""What every plot here shares: letters that can be read at half size, and series named at their ends.

python benchmarks/figure.py    # draws again, from the newest rows, all that rows alone can draw
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS
from matplotlib.axes import Axes

# At half size a letter is still 9 pixels high.
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 14,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


@contextlib.contextmanager
def drawn(file: Path, *, width: float = 10, height: float = 5.5, panels: int = 1) -> Iterator[list[Axes]]:
    """`panels` axes side by side, saved as `file` at the end; sizes in hundreds of pixels."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
        yield list(axes[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
        plt.close(figure)


def legend_outside(axes: Axes, columns: int = 3) -> None:
    """A legend below the axes, where no line runs through it."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def newest(file: Path, of: str, value: str) -> list[dict]:
    """The rows of the commit that wrote the last row of `file` whose key `of` is `value`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    commits = [row["commit"] for row in rows if row.get(of) == value]
    return [row for row in rows if of in row and commits and row["commit"] == commits[-1]]


def main(folder: Path = RESULTS) -> Sequence[Path]:
    """Draw what `folder`'s rows alone can; `bench_quality.py --only summary` and `bench_cluster.py` draw theirs."""
    import ops_plots
    import serving_plots

    serving_plots.plot(newest(folder / "serving.jsonl", "kind", "latency"), folder)
    ops_plots.plot(newest(folder / "ops.jsonl", "bench", "ops_families")[-1], folder)
    return sorted(folder.glob("*.png"))


if __name__ == "__main__":
    for file in main():
        print(file)
