"""The Triton kernels against the equation: every kind of term, aligned and odd shapes, every dtype and path."""

from collections.abc import Iterator, Sequence

import torch

from flora_vllm.ops.gpu.check import PATHS, TOLERANCE, Trial
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.terms import LayerTerms, SlotLimits, group_by_slot

# Slices, in features, tokens of a step.
SHAPES = (
    ((64, 33), 96, 41),
    ((7, 33), 37, 9),
    ((576,), 1536, 70),
    ((1024, 256, 256), 1024, 96),
    ((4096,), 4096, 40),
    ((1536, 1536), 4096, 150),
)
TINY = (((24, 9), 40, 14),)
RANK, LOW = 9, 12


def slots_of(trial: Trial) -> list[LayerTerms | None]:
    """A slot for every kind of adapter, after slot 0 and with one left empty."""
    plain = trial.terms(0, 0, plain=2)
    return [
        None,
        trial.terms(1),  # FLoRA of rank 1
        trial.terms(8),  # FLoRA
        trial.terms(4, plain=1),  # HiRA
        plain,  # IA3 on outputs
        trial.terms(0, LOW, plain=1),  # LoRA with another weight of the base
        trial.terms(0, 5, plain=2, offset=True),  # DoRA with a bias of its own
        (plain[0], *[None] * (len(trial.sizes) - 1)),  # one slice only
        None,
        trial.terms(RANK, 3, offset=True),  # everything, without plain W x
    ]


def checks(device: torch.device, shapes: Sequence = SHAPES) -> Iterator[tuple[str, float, float]]:
    """(what, error, allowed error), both in units of the reference's root mean square."""
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (device.type == "cuda")
    for dtype in dtypes:
        for sizes, in_features, tokens in shapes:
            trial = Trial(device, dtype, sizes, in_features, tokens)
            slots = slots_of(trial)
            limits = SlotLimits(slots=len(slots) - 1, rank=RANK, low_rank=LOW)
            where = f"{str(dtype).removeprefix('torch.')} {'+'.join(map(str, sizes))}x{in_features}"
            steps = {
                "mixed": torch.arange(tokens) * 7 % len(slots),
                # One slot in a long run, others one token each.
                "runs": torch.cat([torch.arange(len(slots))[: tokens // 2], torch.full((tokens,), 2)])[:tokens],
            }
            kernels = {path: trial.kernel(path, limits, slots) for path in (*PATHS, "auto")}
            for name, slot_T in steps.items():
                segments = group_by_slot(slot_T)
                for path, kernel in kernels.items():
                    error = trial.error(trial.forward(kernel, segments), slots, segments)
                    yield f"{where} {name} {path}", error, TOLERANCE[dtype]
                step = StepBuffers(tokens, len(slots), device)
                step.fill(segments)
                y_TO = trial.graph_form(kernels["auto"], step, row_budget=2 * tokens)
                yield f"{where} {name} graph form", trial.error(y_TO, slots, segments), TOLERANCE[dtype]
