"""What a layer's call costs where adapters are mixed or tokens choose, over one adapter of the summed ranks.

    python benchmarks/ops_choices.py            # prints; bench_activation.py runs it and writes its rows
    python benchmarks/ops_choices.py --quick    # two seconds a shape

16 decoding tokens of one adapter on q and v of a packed layer, bfloat16, one pinned thread, cold weights, in turns.
`meteora_28x8` chooses 2 of 28 LoRAs of rank 8 by token, beside `lora_r224`; a mix of four is the engine's own.
"""

import argparse
import os
from collections.abc import Callable
from itertools import count
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from bench_ops import COLD_BYTES, CPU, measure

from flora_vllm.mixing import mixed
from flora_vllm.ops.rare import GatedAdded
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.table import calibrated_rule, make_linear
from flora_vllm.ops.terms import LayerTerms, SliceTerms, group_by_slot

# in features, out features of q, k, v: SmolLM2's, and of models of 1 and 8 billion parameters
SHAPES = ((576, (576, 192, 192)), (2048, (2048, 512, 512)), (4096, (4096, 1024, 1024)))
TOKENS = 16
EXPERTS, RANK, TOP = 28, 8, 2
PLAIN = torch.ones(1)
# candidate -> what it is measured against
AGAINST = {"meteora_28x8": "lora_r224", "mix_4_lora_r8": "lora_r32", "mix_4_flora_r2": "flora_r8"}
CANDIDATES = ("base", *AGAINST.values(), *AGAINST)


class Layer:
    """Cold copies of one packed layer, each with every candidate's adapter in a slot of its own."""

    def __init__(self, inputs: int, sizes: tuple[int, ...]) -> None:
        self._inputs, self._sizes = inputs, sizes
        self._random = torch.Generator().manual_seed(0)
        copies = max(2, -(-COLD_BYTES // (2 * inputs * sum(sizes))))
        rule = calibrated_rule("auto", inputs, sum(sizes), torch.bfloat16, CPU)
        self.weights = [self._tensor(sum(sizes), inputs) for _ in range(copies)]
        self.x_TI = self._tensor(TOKENS, inputs)
        self.slots: dict[str, LayerTerms | None] = {name: self._terms(name) for name in CANDIDATES}
        self.shells = []
        for weight_OI in self.weights:
            kernel = make_linear(weight_OI, _base(weight_OI), sizes, rule, inputs, CPU)
            self.shells.append(Shell(kernel, sizes))
            for slot, terms in enumerate(self.slots.values()):
                if slot:
                    self.shells[-1].write_slot(slot, terms)

    def _tensor(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=self._random) * shape[-1] ** -0.5).to(torch.bfloat16)

    def _terms(self, name: str) -> LayerTerms | None:
        kind, _, rest = name.partition("_")
        if kind == "base":
            return None
        if kind == "mix":
            sizes = {"layer": self._sizes}
            part = rest.removeprefix("4_")
            weighted = [(0.25, {"layer": self._each(lambda size: self._low(part, size))}) for _ in range(4)]
            return mixed(weighted, sizes)["layer"]
        make = self._gated if kind == "meteora" else lambda size: self._low(name, size)
        return self._each(make)

    def _each(self, make: Callable[[int], SliceTerms]) -> LayerTerms:
        q, _, v = self._sizes
        return (make(q), None, make(v))

    def _low(self, name: str, size: int) -> SliceTerms:
        kind, _, rank = name.partition("_r")
        inputs_RI, outputs_RO = self._tensor(int(rank), self._inputs), self._tensor(int(rank), size)
        if kind == "flora":
            return SliceTerms(a_RI=inputs_RI, b_RO=outputs_RO)
        return SliceTerms(PLAIN, down_RI=inputs_RI, up_RO=outputs_RO)

    def _gated(self, size: int) -> SliceTerms:
        gate_EI = self._tensor(EXPERTS, self._inputs).float()
        down_LI, up_OL = self._tensor(EXPERTS * RANK, self._inputs), self._tensor(size, EXPERTS * RANK)
        return SliceTerms(PLAIN, rare=(GatedAdded(gate_EI, down_LI, up_OL, TOP, 1.0, is_absolute=False),))

    def call(self, name: str) -> Callable[[], torch.Tensor]:
        slot = CANDIDATES.index(name)
        segments = group_by_slot([slot] * TOKENS) if slot else None
        turn = count()
        return lambda: self.shells[next(turn) % len(self.shells)].forward(self.x_TI, None, segments)

    def check(self) -> None:
        """Raises AssertionError unless every candidate's result is the equation's."""
        for slot, name in enumerate(CANDIDATES):
            y_TO = self.call(name)().double()
            segments = group_by_slot([slot] * TOKENS)
            slots = [*self.slots.values()]
            truth = reference_linear(self.x_TI, self.weights[0], None, self._sizes, slots, segments)
            error = float((y_TO - truth).norm() / truth.norm())
            assert error < 2 * 2.0**-8, f"{name}: error {error:.2g}"


def _base(weight_OI: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x_TI: torch.nn.functional.linear(x_TI, weight_OI)


def run(quick: bool) -> dict[str, Any]:
    harness.pin_to_one_core()
    found: dict[str, Any] = {}
    for inputs, sizes in SHAPES:
        layer = Layer(inputs, sizes)
        layer.check()
        samples = measure({(name, 0): layer.call(name) for name in CANDIDATES}, 2.0 if quick else 20.0)
        times = {name: harness.summary(values["cpu_us"]) for (name, _), values in samples.items()}
        ratios = {
            f"{name}_vs_{other}": times[name]["median"] / times[other]["median"] for name, other in AGAINST.items()
        }
        found[str(inputs)] = {"cpu_us": times, **{key: round(value, 3) for key, value in ratios.items()}}
        text = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        harness.progress(f"q and v of {inputs} features, base {times['base']['median']:.0f} µs: {text}")
    keys = [f"{name}_vs_{other}" for name, other in AGAINST.items()]
    means = {key: round(harness.geometric_mean(found[width][key] for width in found), 3) for key in keys}
    return {"tokens": TOKENS, "by_width": found, **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seconds a shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        harness.finish(run(options.quick))


if __name__ == "__main__":
    main()
