"""Paired comparisons of methods over languages, and the benchmark's summary line.

Seeds of one language are averaged first: languages are the independent units. The margins were fixed before anything
was measured: bits per byte 1 % and word error rate 10 % relative, judged on the 95 % interval of the paired difference.
"""

import statistics
from collections.abc import Iterable, Sequence

METRICS = {"code": "bpb", "speech": "wer"}
MARGINS = {"code": 0.01, "speech": 0.10}
PAIRS = (("flora", "lora"), ("flora", "ia3"), ("flora", "base"), ("lora", "base"), ("ia3", "base"))
# 97.5 % quantiles of Student's t for 1 to 7 degrees of freedom: two to eight languages.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)


def by_language(cells: Iterable[dict], task: str, method: str, metric: str, rank: int = 1) -> dict[str, float]:
    """Language -> mean over seeds; the bare model and IA3 have no rank."""
    found: dict[str, list[float]] = {}
    for row in cells:
        if row["task"] == task and row["method"] == method and row["rank"] in (rank, 1 if method == "base" else rank):
            found.setdefault(row["language"], []).append(row[metric])
    return {language: statistics.mean(values) for language, values in found.items()}


def compare(cells: Sequence[dict], task: str, one: str, other: str, metric: str, rank: int = 1) -> dict | None:
    """Relative difference of `one` to `other` over the languages both have; None for fewer than two."""
    a, b = (by_language(cells, task, method, metric, rank) for method in (one, other))
    languages = [language for language in a if language in b]
    if len(languages) < 2:
        return None
    differences = [a[language] / b[language] - 1 for language in languages]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = T_QUANTILES[len(differences) - 2] * error
    return {
        "task": task,
        "metric": metric,
        "rank": rank,
        "pair": f"{one} against {other}",
        "languages": len(languages),
        "relative_difference": round(mean, 5),
        "standard_error": round(error, 5),
        "interval_95": [round(mean - half, 5), round(mean + half, 5)],
        "margin": MARGINS[task],
        "verdict": verdict(mean - half, mean + half, MARGINS[task]),
    }


def verdict(low: float, high: float, margin: float) -> str:
    """What the interval of a relative difference shows against "not worse by more than `margin`"."""
    if high <= margin:
        return "better" if high < 0 else "not worse"
    return "worse" if low > margin else "open: the interval is wider than the margin allows"


def summarise(cells: Sequence[dict], rows: Sequence[dict], *, quick: bool) -> tuple[list[dict], dict]:
    """Every comparison there are cells for, and the result line; a mean is over languages that every method has."""
    comparisons = [
        found
        for task, metric, rank in (
            ("code", "bpb", 1),
            ("code", "bpb", 4),
            ("speech", "wer", 1),
            ("speech", "wer_raw", 1),
        )
        for one, other in PAIRS
        if (found := compare(cells, task, one, other, metric, rank)) is not None
    ]
    result: dict = {"benchmark": "quality", "quick": quick}
    for task, prefix, metric in (
        ("code", "code_bpb", "bpb"),
        ("speech", "asr_wer", "wer"),
        ("speech", "asr_wer_raw", "wer_raw"),
    ):
        means = {m: by_language(cells, task, m, metric) for m in ("base", "ia3", "lora", "flora")}
        shared = set.intersection(*(set(values) for values in means.values()))
        for method, values in means.items():
            found = [values[language] for language in sorted(shared)]
            result[f"{prefix}_{method}"] = round(statistics.mean(found), 5) if found else None
        result[f"{prefix}_languages"] = len(shared)
    newest = {row["task"]: row["served_equals_peft"] for row in rows if row.get("kind") == "served"}
    result["served_equals_peft"] = max(newest.values(), default=None)
    result["served_tasks"] = sorted(newest)
    return comparisons, result
