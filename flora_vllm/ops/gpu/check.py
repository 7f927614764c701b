"""The Triton kernels tried on the GPU at hand before they serve on it: they were written and tested without one."""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence

import torch

from flora_vllm.ops.dispatch import DispatchRule, PathChoice
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms, SlotLimits, group_by_slot

# Largest error allowed, in units of the reference's root mean square: a few roundings of an output that is up to four
# times as large. A wrong index or a row left out is off by about one.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Runs something, and gives its output and what runs it again on the same memory.
Capture = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]
PATHS: tuple[PathChoice, ...] = ("stacked", "modulated")


class Trial:
    """A random layer on a device, its slots' contents and x, with the reference to compare with."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        sizes: Sequence[int],
        in_features: int,
        tokens: int,
        seed: int = 0,
    ) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.sizes, self.in_features = tuple(sizes), in_features
        self.weight_OI = self.tensor(sum(sizes), in_features)
        self.bias_O = self.tensor(sum(sizes))
        self.x_TI = self.tensor(tokens, in_features) * in_features**0.5
        self._bias_here, self._x_here = self.bias_O.to(device), self.x_TI.to(device)
        self._weight_here = self.weight_OI.to(device)

    def tensor(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=self._random) * shape[-1] ** -0.5).to(self.dtype)

    def terms(self, rank: int, low: int = 0, plain: int | None = None, offset: bool = False) -> LayerTerms:
        """Slot contents around W's own size. `plain`: None no plain W x, 1 one weight for all outputs, 2 by output."""
        return tuple(
            SliceTerms(
                plain_O=None if plain is None else 1 + self.tensor(1 if plain == 1 else size).float(),
                a_RI=1 + self.tensor(rank, self.in_features) if rank else None,
                b_RO=1 + self.tensor(rank, size) if rank else None,
                down_RI=self.tensor(low, self.in_features) if low else None,
                up_RO=self.tensor(low, size) if low else None,
                offset_O=self.tensor(size).float() if offset else None,
            )
            for size in self.sizes
        )

    def kernel(self, path: PathChoice, limits: SlotLimits, slots: Sequence[LayerTerms | None]) -> TritonLinear:
        """The kernels' layer with `slots[1:]` written."""
        weight = self._weight_here
        base = functools.partial(torch.nn.functional.linear, weight=weight)
        kernel = TritonLinear(weight, base, self.sizes, DispatchRule(path), self.in_features, limits)
        self.write(kernel, slots)
        return kernel

    def write(self, kernel: TritonLinear, slots: Sequence[LayerTerms | None]) -> None:
        for slot, content in enumerate(slots[1:], 1):
            kernel.write_slot(slot, content)

    def forward(self, kernel: TritonLinear, segments: Segments) -> torch.Tensor:
        return kernel.forward(self._x_here, self._bias_here, segments)

    def graph_form(self, kernel: TritonLinear, step: StepBuffers, row_budget: int) -> torch.Tensor:
        return kernel.graph_form(self._x_here, self._bias_here, step, row_budget)

    def error(self, y_TO: torch.Tensor, slots: Sequence[LayerTerms | None], segments: Segments) -> float:
        """Largest error in units of the reference's root mean square; not a number if there is one in y."""
        wanted_TO = reference_linear(self.x_TI, self.weight_OI, self.bias_O, self.sizes, slots, segments)
        return float((y_TO.cpu().double() - wanted_TO).abs().max() / wanted_TO.square().mean().sqrt())


@functools.cache
def why_wrong(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels' results on `device` in `dtype`, or None. Compiles a few kernels once."""
    return _verdict("the kernels", dtype, lambda: dict(_errors(device, dtype)))


@functools.cache
def why_graphs_wrong(device: torch.device, dtype: torch.dtype, capture: Capture | None = None) -> str | None:
    """What is wrong with a CUDA graph that holds the kernels, or None: captured once with empty slots, replayed with
    other slots, ranks and segments. `capture` is CUDA's unless a test brings another."""
    taken = capture or capture_on_gpu
    return _verdict("a CUDA graph with the kernels", dtype, lambda: dict(_graph_errors(device, dtype, taken)))


def capture_on_gpu(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    """Capture `run` in a CUDA graph, after the run on a side stream that capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay


def launch_errors() -> tuple[type[Exception], ...]:
    """What a launch that fails may raise: torch and Triton for CUDA's errors, Triton for a kernel that does not compile
    or fit the chip, the launcher for arguments it does not take."""
    return RuntimeError, TypeError, importlib.import_module("triton.errors").TritonError


def _verdict(subject: str, dtype: torch.dtype, errors_of: Callable[[], dict[str, float]]) -> str | None:
    try:
        errors = errors_of()
    except launch_errors() as error:
        return f"{subject}: does not run on this GPU ({error})"
    worst = max(errors, key=lambda name: errors[name])
    # Not <=: a NaN is an error too.
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        return f"{subject}: computes something else on this GPU (error {errors[worst]:.2g} in {worst})"
    return None


def _errors(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(what, error) of each path, on small layers with every kind of term: odd sizes and multiples of 16 are launched
    with other tiles."""
    for sizes in ((64, 33), (64, 32)):
        trial = Trial(device, dtype, sizes, 96, tokens=41)
        slots = [None, trial.terms(1, 3), trial.terms(5, 1, 2, offset=True), (trial.terms(0, 0, 2)[0], None)]
        segments = group_by_slot(torch.arange(41) * 7 % 4)
        for path in PATHS:
            kernel = trial.kernel(path, SlotLimits(slots=3, rank=5, low_rank=3), slots)
            for name in (path, f"{path}, launched again"):  # `compiled` launches what Triton launched at first
                yield f"{name} {sizes}", trial.error(trial.forward(kernel, segments), slots, segments)


def _graph_errors(device: torch.device, dtype: torch.dtype, capture: Capture) -> Iterator[tuple[str, float]]:
    # In features enough for the product to be cut: the sum of its parts is tried too.
    trial = Trial(device, dtype, (48, 16), 1024, tokens=13, seed=1)
    empty: list[LayerTerms | None] = [None] * 4
    kernel = trial.kernel("auto", SlotLimits(slots=3, rank=4, low_rank=8), empty)
    step = StepBuffers(13, 4, device)
    step.fill(group_by_slot([0] * 13))
    y_TO, replay = capture(lambda: trial.graph_form(kernel, step, 13 + 16))
    contents = {
        "ranks of one": ([None, trial.terms(1), trial.terms(1, 8), None], [1, 2, 0] * 4 + [1]),
        "every kind of term": (
            [None, trial.terms(4, 3, 1), (None, trial.terms(0, 5, 2, offset=True)[1]), trial.terms(2, offset=True)],
            [3, 3, 1, 1, 1, 1, 0, 2, 2, 0, 3, 1, 2],
        ),
        "no adapter": (empty, [0] * 13),
    }
    for name, (slots, slot_T) in contents.items():
        trial.write(kernel, slots)
        segments = group_by_slot(slot_T)
        step.fill(segments)
        y_TO.fill_(float("nan"))
        replay()
        yield name, trial.error(y_TO, slots, segments)
