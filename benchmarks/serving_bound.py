"""What the rows model allows FLoRA traffic, from steps measured without adapters.

A step costs some time for its linear layers, which grows with the rows they multiply, and the rest (attention,
sampling, Python), which does not depend on adapters. The model says FLoRA changes only the rows: a segment of m tokens
costs the cheaper of m·r rows and m + c(r) rows. So, by output token,

    predicted ratio = t / (t + decode extra / n + prefill extra / output tokens of a request)

with t from the base-only run at n sequences, and extra = t_linear(rows with adapters) - t_linear(rows without),
measured on the model's own layer shapes by the op without adapters. A prefill is one segment of its prompt's length.
"""

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rows_model import step_rows
from serving_adapters import linear_shapes
from serving_load import ZIPF_EXPONENT

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.table import calibrated_rule, make_linear

DRAWS = 200


def predicted_ratios(
    model: Path, ranks: Sequence[int], pool: int, concurrency: int, token_s: float, lengths: Sequence[tuple[int, int]]
) -> dict[int, float]:
    """Rank -> throughput of FLoRA traffic over base-only traffic by the rows model, all from one measurement.

    `token_s`: seconds per output token of base-only traffic. `lengths`: (prompt, output) tokens of the requests.
    """
    shapes = Counter(_packed(linear_shapes(model)))
    rules = [
        calibrated_rule("auto", shape[1], shape[0], torch.bfloat16, torch.device("cpu")) for shape in shapes.elements()
    ]
    linear_s = _measure(shapes, concurrency)
    return {rank: _ratio(rank, rules, linear_s, pool, concurrency, token_s, lengths) for rank in ranks}


def _ratio(
    rank: int,
    rules: Sequence[DispatchRule],
    linear_s: Callable[[float], float],
    pool: int,
    concurrency: int,
    token_s: float,
    lengths: Sequence[tuple[int, int]],
) -> float:
    def rows(segments: Iterable[int], rule: DispatchRule) -> float:
        return step_rows(segments, rank, lambda _: rule.constant + rule.slope * rank)

    weights = [(i + 1) ** -ZIPF_EXPONENT for i in range(pool)]
    rng = random.Random(0)
    decode_s = []
    for _ in range(DRAWS):
        segments = Counter(rng.choices(range(pool), weights, k=concurrency)).values()
        decode_s.append(linear_s(statistics.mean(rows(segments, rule) for rule in rules)) - linear_s(concurrency))
    prompts = [prompt for prompt, _ in lengths]
    more_rows = statistics.mean(rows([p], rule) - p for p in prompts for rule in set(rules))
    # A prefill joins a step that is already bound by arithmetic: each further row costs what it costs there.
    prefill_s = more_rows * (linear_s(256) - linear_s(128)) / 128
    output_tokens = statistics.mean(output for _, output in lengths)
    return token_s / (token_s + statistics.mean(decode_s) / concurrency + prefill_s / output_tokens)


def _packed(shapes: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """(O, I) of the layers as served: q, k, v in one, gate and up in one."""
    sums: dict[str, tuple[int, int]] = {}
    names = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    for module, (out_features, in_features) in shapes.items():
        parent, _, own = module.rpartition(".")
        key = f"{parent}.{names.get(own, own)}"
        sums[key] = (sums.get(key, (0, 0))[0] + out_features, in_features)
    return list(sums.values())


def _measure(shapes: Counter, concurrency: int) -> Callable[[float], float]:
    """Seconds of all linear layers of a step by rows, interpolated between measured row counts."""
    grid = sorted({concurrency, 16, 24, 32, 48, 64, 96, 128, 192, 256})
    layers = []
    for (out_features, in_features), count in shapes.items():
        for _ in range(count):
            weight_OI = torch.randn(out_features, in_features, dtype=torch.bfloat16)
            kernel = make_linear(
                weight_OI,
                lambda x, w=weight_OI: torch.nn.functional.linear(x, w),
                (out_features,),
                DispatchRule(),
                in_features,
                torch.device("cpu"),
            )
            layers.append((kernel, in_features))
    times = {rows: [] for rows in grid}
    for _ in range(7):
        for rows in grid:
            inputs = {i: torch.randn(rows, i, dtype=torch.bfloat16) for i in {i for _, i in layers}}
            start = time.perf_counter()
            for kernel, in_features in layers:
                kernel.forward(inputs[in_features], None, None)
            times[rows].append(time.perf_counter() - start)
    medians = [(rows, statistics.median(samples)) for rows, samples in times.items()]

    def at(rows: float) -> float:
        for (low, low_s), (high, high_s) in itertools.pairwise(medians):
            if rows <= high:
                return low_s + (high_s - low_s) * (rows - low) / (high - low)
        (low, low_s), (high, high_s) = medians[-2:]
        return high_s + (high_s - low_s) * (rows - high) / (high - low)

    return at
