"""One plot a task: the measure of every method, language by language."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from figure import drawn, legend_outside
from quality_data import CODE, SPEECH
from quality_plan import METHODS
from quality_stats import METRICS, by_language

LABELS = {"base": "base model", "flora": "FLoRA", "lora": "LoRA", "ia3": "IA3"}
TITLES = {
    "code": ("quality_code.png", "bits per byte of held-out files (lower is better)"),
    "speech": ("quality_speech.png", "word error rate, %, normalised (lower is better)"),
}


def plot(cells: Sequence[dict], folder: Path) -> None:
    """Write quality_code.png and quality_speech.png into `folder`, each if there are cells for it."""
    for task, (name, title) in TITLES.items():
        if any(row["task"] == task for row in cells):
            _plot(cells, task, folder / name, title)


def _plot(cells: Sequence[dict], task: str, file: Path, title: str) -> None:
    """Bars at rank 1, means over seeds; the last group is the mean over languages that every method has.

    The title names the languages that aren't all there.
    """
    found = {method: by_language(cells, task, method, METRICS[task]) for method in METHODS}
    languages = [language for language in found["base"] if all(language in values for values in found.values())]
    absent = [language for language in (CODE if task == "code" else SPEECH) if language not in languages]
    note = f"\nnot measured with every method yet: {', '.join(absent)}" if absent else ""
    with drawn(file, height=5) as (axes,):
        for i, (method, values) in enumerate(found.items()):
            heights = [values[language] for language in languages]
            heights += [statistics.mean(heights)] if heights else []
            axes.bar([x + (i - 1.5) * 0.2 for x in range(len(heights))], heights, 0.2, label=LABELS[method])
        axes.set_xticks(range(len(languages) + bool(languages)), [*languages, "mean"] if languages else [])
        axes.set(ylabel=title.partition(" (")[0], title=title + note)
        axes.grid(axis="x", visible=False)
        legend_outside(axes, len(LABELS))
