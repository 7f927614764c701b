"""What an adapted linear costs: our op against vLLM's linear, its LoRA and the paper's stacking, mix by mix.

    python benchmarks/bench_ops.py --quick      bfloat16, two layer shapes, under four minutes
    python benchmarks/bench_ops.py --families   every family's step and loads, two minutes; appends too
    python benchmarks/bench_ops.py              all shapes and ranks; appends to benchmarks/results/ops.jsonl

One pinned thread. Every call meets a cold W: it rotates over copies that together exceed the last cache. Candidates of
a mix take turns in one loop, so that a change of the machine's mood meets all of them; medians of thread CPU time.
The op is checked against the equation first. Candidates:
    vllm       the linear vLLM's CPU backend runs for such a layer (prepacked oneDNN)
    base       our op, no adapter in the step
    flora, lora  our op, Hadamard or low-rank terms of one rank on every token
    vllm_lora  vllm plus what PunicaWrapperCPU adds to it
    stacked    the paper's way in torch: r scaled copies of x through vLLM's linear, then scaled and summed
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

# One thread from the start: OpenMP pools are sized when they are made.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import harness
import torch

from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.table import LinearKernel, calibrated_rule, implementation_of, make_linear
from flora_vllm.ops.terms import SliceTerms, group_by_slot

CPU = torch.device("cpu")
# More than twice the last-level cache of the machines we know; a copy read once is gone when its turn comes again.
COLD_BYTES = 80 * 2**20
SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))  # in features, out features
RANKS = (1, 4, 8, 16)
# Tokens of each adapter of a step.
MIXES = {
    "32 decode/32 adapters + 512 prefill": [1] * 32 + [512],
    "32 decode/8 adapters + 512 prefill": [10, 6, 4, 4, 3, 2, 2, 1, 512],
    "4x128 prefill": [128] * 4,
    "512 prefill": [512],
    "32 decode/32 adapters": [1] * 32,
    "8x8": [1] * 8,
}
MIXED, MIXED8, _, PREFILL, _, _ = MIXES
# key: (mixes, candidate, rank) over (candidate, rank)
KEYS = {
    "base_vs_vllm": (tuple(MIXES), ("base", 0), ("vllm", 0)),
    **{f"r{rank}_mixed_vs_base": ((MIXED,), ("flora", rank), ("base", 0)) for rank in RANKS},
    "r8_mixed8_vs_base": ((MIXED8,), ("flora", 8), ("base", 0)),
    "r8_prefill_vs_base": ((PREFILL,), ("flora", 8), ("base", 0)),
    "r8_mixed_vs_lora": ((MIXED,), ("flora", 8), ("lora", 8)),
    "r8_mixed8_vs_lora": ((MIXED8,), ("flora", 8), ("lora", 8)),
    "r8_mixed_vs_vllm_lora": ((MIXED,), ("flora", 8), ("vllm_lora", 8)),
    "stacked_vs_r8_mixed": ((MIXED,), ("stacked", 8), ("flora", 8)),
}
Candidate = tuple[str, int]
SLOW = ("stacked", "vllm_lora")
LEAST_TURNS = 16


@dataclass
class Copy:
    """One cold set of everything a candidate touches."""

    vllm: Callable[[torch.Tensor], torch.Tensor]
    flora: dict[int, LinearKernel]


class Bench:
    """One layer shape and dtype: cold copies and the candidates' calls."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.rule = calibrated_rule("auto", in_features, out_features, dtype, CPU)
        self.random = torch.Generator().manual_seed(0)
        weight_bytes = in_features * out_features * dtype.itemsize
        self.weights = [self.tensor(out_features, in_features) for _ in range(max(2, -(-COLD_BYTES // weight_bytes)))]
        self.vllm = [vllm_linear(weight_OI) for weight_OI in self.weights]
        self.ours = [self.kernel(weight_OI) for weight_OI in self.weights]
        self.turn = count()

    def tensor(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.random) * shape[-1] ** -0.5).to(self.dtype)

    def kernel(self, weight_OI: torch.Tensor) -> LinearKernel:
        def base(x_TI: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x_TI, weight_OI)

        return make_linear(weight_OI, base, (self.out_features,), self.rule, self.in_features, CPU)

    def candidates(self, mix: list[int], wanted: list[Candidate]) -> dict[Candidate, Callable[[], torch.Tensor]]:
        """A call per candidate of the mix; adapters are written to fresh slots of every copy."""
        tokens = sum(mix)
        x_TI = self.tensor(tokens, self.in_features)
        calls = {}
        first_slot = 1
        for name, rank in wanted:
            if name in ("vllm", "base"):
                linears = self.vllm if name == "vllm" else [self.plain(kernel) for kernel in self.ours]
                calls[name, rank] = self.rotating([_bound(linear, x_TI) for linear in linears])
            elif name in ("flora", "lora"):
                slots = range(first_slot, first_slot + len(mix))
                first_slot = slots.stop
                segments = group_by_slot([slot for slot, n in zip(slots, mix, strict=True) for _ in range(n)])
                for kernel in self.ours:
                    for slot in slots:
                        kernel.write_slot(slot, (self.terms(name, rank),))
                calls[name, rank] = self.rotating([self.adapted(kernel, x_TI, segments) for kernel in self.ours])
            else:
                make = vllm_lora if name == "vllm_lora" else stacked
                calls[name, rank] = self.rotating([make(self, linear, x_TI, mix, rank) for linear in self.vllm])
        return calls

    def terms(self, name: str, rank: int) -> SliceTerms:
        inputs, outputs = self.tensor(rank, self.in_features), self.tensor(rank, self.out_features)
        if name == "flora":
            return SliceTerms(a_RI=inputs, b_RO=outputs)
        return SliceTerms(plain_O=torch.ones(1), down_RI=inputs, up_RO=outputs)

    @staticmethod
    def plain(kernel: LinearKernel) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x_TI: kernel.forward(x_TI, None, None)

    @staticmethod
    def adapted(kernel: LinearKernel, x_TI, segments) -> Callable[[], torch.Tensor]:
        return lambda: kernel.forward(x_TI, None, segments)

    def rotating(self, calls: list[Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
        """One call after another. Each runs once now: vLLM's linears make a kernel per handle and number of rows."""
        for call in calls:
            call()
        return lambda: calls[next(self.turn) % len(calls)]()


def _bound(linear, x_TI):
    return lambda: linear(x_TI)


def vllm_linear(weight_OI: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The call that vLLM's CPU backend installs in a linear layer with this weight."""
    import vllm._custom_ops  # noqa: F401 - registers the kernels that the dispatch below looks for
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight_OI.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x_TI: layer.cpu_linear(x_TI, layer.weight, None)


def vllm_lora(bench: Bench, linear, x_TI: torch.Tensor, mix: list[int], rank: int) -> Callable[[], torch.Tensor]:
    """vllm plus PunicaWrapperCPU.add_lora_linear's operations for one slice, with its float32 buffer."""
    from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink, sgmv_expand_slice, sgmv_shrink

    down_SRI = bench.tensor(len(mix), 1, rank, bench.in_features)
    up_SOR = bench.tensor(len(mix), 1, bench.out_features, rank)
    lengths, adapters = torch.tensor(mix), torch.arange(len(mix))
    starts = torch.cumsum(lengths, 0) - lengths
    prefill = starts, lengths, adapters, len(mix), max(mix), sum(mix)
    token_adapters = torch.repeat_interleave(adapters, lengths)
    is_prefill = max(mix) > 1

    def call() -> torch.Tensor:
        y_TO = linear(x_TI)
        middle_TR = torch.zeros(x_TI.shape[0], rank)
        if is_prefill:
            sgmv_shrink(x_TI, down_SRI, middle_TR, *prefill, 1.0)
            sgmv_expand_slice(middle_TR, up_SOR, y_TO, *prefill, 0, bench.out_features, True)
        else:
            bgmv_shrink(x_TI, down_SRI, middle_TR, token_adapters, 1.0)
            bgmv_expand_slice(middle_TR, up_SOR, y_TO, token_adapters, 0, bench.out_features, True)
        return y_TO

    return call


def stacked(bench: Bench, linear, x_TI: torch.Tensor, mix: list[int], rank: int) -> Callable[[], torch.Tensor]:
    """arXiv 2312.05677, equations 5 and 6, as its authors run it: r copies of every token through the base."""
    a_SRI = bench.tensor(len(mix), rank, bench.in_features)
    b_SRO = bench.tensor(len(mix), rank, bench.out_features)
    token_adapters = torch.repeat_interleave(torch.arange(len(mix)), torch.tensor(mix))
    rows = x_TI.shape[0] * rank

    def call() -> torch.Tensor:
        stacked_VI = (x_TI[:, None, :] * a_SRI[token_adapters]).reshape(rows, bench.in_features)
        y_TRO = linear(stacked_VI).reshape(x_TI.shape[0], rank, bench.out_features)
        return (y_TRO * b_SRO[token_adapters]).sum(1)

    return call


def wanted_candidates(mix: str, quick: bool) -> list[Candidate]:
    """Quick: what the keys need and no more."""
    if quick:
        needed = {pair for mixes, over, under in KEYS.values() if mix in mixes for pair in (over, under)}
        return sorted(needed)
    every = [(name, rank) for rank in RANKS for name in ("flora", "lora", "vllm_lora", "stacked")]
    return [("vllm", 0), ("base", 0), *every]


def measure(calls: dict[Candidate, Callable[[], torch.Tensor]], budget_s: float) -> dict[Candidate, dict[str, list]]:
    """Samples of each call in µs of thread CPU time and of wall time, interleaved."""
    samples: dict[Candidate, dict[str, list]] = {pair: {"cpu_us": [], "wall_us": []} for pair in calls}
    end = time.perf_counter() + budget_s
    for turn in count():
        if turn > LEAST_TURNS and time.perf_counter() > end:
            return samples
        for pair, call in calls.items():
            # They take ten times the others' time, and return hundreds of MB to the system; whoever follows must not
            # pay for new pages, so the others run once untimed and are mostly followed by each other.
            if pair[0] not in SLOW:
                call()
            elif turn % 4:
                continue
            wall, cpu = time.perf_counter(), time.thread_time()
            call()
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            samples[pair]["cpu_us"].append(cpu * 1e6)
            samples[pair]["wall_us"].append(wall * 1e6)
    raise AssertionError("count() does not end")


def check_op(bench: Bench) -> None:
    """Raises AssertionError unless our op's result is the equation's, for every kind of term timed here."""
    mix = [1, 1, 40, 3]
    slots = [None, *((bench.terms("flora", 8),), (bench.terms("lora", 8),)) * 2]
    segments = group_by_slot([slot for slot, n in enumerate(mix, 1) for _ in range(n)])
    x_TI = bench.tensor(sum(mix), bench.in_features)
    kernel, weight_OI = bench.ours[0], bench.weights[0]
    for slot, terms in enumerate(slots[1:], 1):
        kernel.write_slot(slot, terms)
    y_TO = kernel.forward(x_TI, None, segments).double()
    truth = reference_linear(x_TI, weight_OI, None, (bench.out_features,), slots, segments)
    error = (y_TO - truth).norm() / truth.norm()
    # Two roundings of at most 2^-8 each (x scaled or W modulated or down x; y), or float32's long sums.
    allowed = 2 * 2.0**-8 if bench.dtype == torch.bfloat16 else bench.in_features * 2.0**-24
    assert error < allowed, f"{bench.dtype} {bench.in_features}x{bench.out_features}: error {error:.2g}"


def run(quick: bool, dtypes: list[torch.dtype], shapes, mixes, budget_s: float) -> tuple[list[dict], dict]:
    """Result rows, and median CPU times by (dtype, shape, mix, candidate)."""
    rows, medians = [], {}
    setup = harness.environment() | {"bench": "ops", "threads": 1, "core": harness.pin_to_one_core()}
    for dtype in dtypes:
        for shape in shapes:
            bench = Bench(shape[0], shape[1], dtype)
            check_op(bench)
            rule = {"constant": round(bench.rule.constant, 1), "slope": round(bench.rule.slope, 2)}
            what = f"{dtype} {bench.in_features}x{bench.out_features}"
            harness.progress(f"{what}: op correct, {len(bench.ours)} cold copies, rule {rule}")
            for mix in mixes:
                wanted = wanted_candidates(mix, quick)
                # A mix with slow candidates needs as many turns as the others.
                found = measure(bench.candidates(MIXES[mix], wanted), budget_s * (1 + len(wanted) // 4))
                times = {pair: harness.summary(samples["cpu_us"]) for pair, samples in found.items()}
                base = times["base", 0]["median"]
                for (name, rank), samples in found.items():
                    medians[dtype, shape, mix, (name, rank)] = times[name, rank]["median"]
                    row = {"dtype": str(dtype).removeprefix("torch."), "in": shape[0], "out": shape[1], "mix": mix}
                    row |= {
                        "candidate": name,
                        "rank": rank,
                        "rule": rule,
                        "op": implementation_of(bench.weights[0], CPU),
                    }
                    row |= {what: harness.summary(values) for what, values in samples.items()}
                    rows.append(setup | row | {"vs_base": round(times[name, rank]["median"] / base, 3)})
                text = "  ".join(f"{n}{r or ''} {times[n, r]['median'] / base:.2f}" for n, r in times)
                harness.progress(f"  {mix}: base {base:.0f} µs, over base: {text} ({times['base', 0]['count']} turns)")
    return rows, medians


def keys(medians: dict, shapes) -> dict[str, float]:
    """The summary: geometric means over shapes (and over mixes where a key names several), bfloat16."""
    result = {}
    for key, (mixes, over, under) in KEYS.items():
        ratios = [
            medians[torch.bfloat16, shape, mix, over] / medians[torch.bfloat16, shape, mix, under]
            for shape in shapes
            for mix in mixes
        ]
        result[key] = round(harness.geometric_mean(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bfloat16, 576x1536 and 2048x2048; writes no rows")
    parser.add_argument("--families", action="store_true", help="every family's step and loads instead; writes rows")
    parser.add_argument("--float32", action="store_true", help="float32 as well; the summary stays bfloat16's")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    if options.families:
        import ops_families

        with torch.inference_mode():
            harness.finish(ops_families.run())
        return
    shapes = SHAPES[:2] if quick else SHAPES
    dtypes = [torch.bfloat16, torch.float32] if options.float32 else [torch.bfloat16]
    with torch.inference_mode():
        rows, medians = run(quick, dtypes, shapes, MIXES, budget_s=5.0 if quick else 6.0)
    result = keys(medians, shapes) | {"quick": quick}
    if not quick:
        harness.append_rows(harness.RESULTS / "ops.jsonl", [*rows, harness.environment() | {"bench": "ops"} | result])
    harness.finish(result)


if __name__ == "__main__":
    main()
