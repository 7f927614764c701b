"""The training loop: one frozen base, one or several adapters, each with its own data, rate, seed and checkpoint.

With several adapters a step runs one batch that holds every adapter's examples, each example through its own
adapter: FLoRA's second use in the paper. The losses are summed, and since no factor is shared, every adapter gets
the gradient it would get alone.
"""

import math
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from flora_vllm.errors import ConfigError, FloraError
from flora_vllm.training.checkpoint import Settings, load_state, log_row, save_state
from flora_vllm.training.data import IGNORED, Batch, Examples, Split, as_batch, batches
from flora_vllm.training.model import FloraModel, pass_on

MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.05


class DivergedError(FloraError, ArithmeticError):
    """The loss is not a finite number; the last good checkpoint was kept."""


@dataclass(frozen=True, eq=False)
class Job:
    """One adapter to train. `name` is its name in the PEFT model, `out` where its state is kept (None: nowhere)."""

    name: str
    settings: Settings
    blocks: Split
    out: Path | None = None


@dataclass(eq=False)
class Progress:
    """One job's moving parts; owned by `train`. `factors`: by name without the job's, which is its place in a file."""

    job: Job
    factors: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: Iterator[torch.Tensor | Batch]
    step: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.step >= self.job.settings.steps


def train(
    model: PeftModel,
    jobs: Sequence[Job],
    *,
    save_every: int = 0,
    seen: Callable[[dict[str, float], int], None] | None = None,
) -> dict[str, list[float]]:
    """Train every job to its last step; returns the losses of the steps run here, by job name.

    Goes on from the state in `job.out`, whatever other jobs there were. State is saved every `save_every` steps, at
    the end, and when the user interrupts. `seen(losses, tokens)` is called after each step. Raises DivergedError,
    ConfigError (the state is of other factors), KeyboardInterrupt (state saved) or OSError (disk full; the earlier
    state is still there).
    """
    runs = [_start(model, job) for job in jobs]
    model.train()
    try:
        while active := [run for run in runs if not run.is_done]:
            losses, tokens = _step(model, active, mixed=len(jobs) > 1)
            with _ctrl_c_waits():
                for run in active:
                    _update(run)
                    _keep(run, losses[run.job.name], save_every)
            if seen is not None:
                seen(losses, tokens)
    except KeyboardInterrupt:
        for run in runs:
            _save(run)
        raise
    return {run.job.name: run.losses for run in runs}


def _start(model: PeftModel, job: Job) -> Progress:
    marker = f".{job.name}."
    factors = {
        f"{n}.".replace(marker, ".").removesuffix("."): p
        for n, p in model.named_parameters()
        if marker in f"{n}." and p.requires_grad
    }
    assert factors, f"no trainable parameters for adapter {job.name}"
    settings = job.settings
    optimizer = torch.optim.AdamW(factors.values(), lr=settings.rate, weight_decay=0.0)
    state = load_state(job.out, settings) if job.out is not None else None
    step = 0
    if state is not None:
        assert job.out is not None, "there is a state"
        _check_same(job.out, factors, state["factors"])
        step = state["step"]
        with torch.no_grad():
            for name, factor in factors.items():
                factor.copy_(state["factors"][name])
        optimizer.load_state_dict(state["optimizer"])
    stream = batches(job.blocks.train, settings.batch, settings.seed, step)
    return Progress(job, factors, optimizer, stream, step)


def _check_same(out: Path, factors: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    """Raises ConfigError if the state beside `out` is of other factors, as another model under the base's name has."""
    shapes, saved = ({n: [*f.shape] for n, f in of.items()} for of in (factors, before))
    differing = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{out} holds a run of other factors ({len(differing)} differ; {name} has shape "
            f"{saved.get(name, 'none')} there, {shapes.get(name, 'none')} now): use the same base model to go on, "
            "another OUT, or --restart to begin anew"
        )


def _step(model: PeftModel, runs: Sequence[Progress], mixed: bool) -> tuple[dict[str, float], int]:
    """The gradients of every run's next step; losses by job name and the number of tokens."""
    device = next(model.parameters()).device
    parts = [as_batch(next(run.batches), device) for run in runs]
    names = [run.job.name for run, part in zip(runs, parts, strict=True) for _ in range(len(part))]
    # Dropout must not depend on what ran before, or a resumed run would differ.
    torch.manual_seed(runs[0].job.settings.seed * 1_000_003 + runs[0].step)
    for run in runs:
        for group in run.optimizer.param_groups:
            group["lr"] = run.job.settings.rate * schedule(run.step, run.job.settings.steps)
    with example_adapters(model, names) if mixed else nullcontext():
        losses = dict(zip((run.job.name for run in runs), backward(model, parts), strict=True))
    for run in runs:
        loss = losses[run.job.name]
        norm = nn.utils.clip_grad_norm_(run.factors.values(), MAX_GRADIENT_NORM)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise DivergedError(_diverged(run, loss, float(norm)))
    return losses, sum(part.tokens for part in parts)


def _update(run: Progress) -> None:
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _ctrl_c_waits() -> Generator[None]:
    """Ctrl-C takes effect after the block: state saved between an update and its count would train a step twice."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *call: came.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


def backward(model: nn.Module, parts: Sequence[Batch]) -> list[float]:
    """One forward over all parts' rows and one backward of the sum of their losses; returns each part's loss.

    Several parts need inputs of the same shape but for the number of rows.
    """
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    logits = model(**inputs).logits
    rows = logits.split([len(part) for part in parts])
    losses = [cross_entropy(part_logits, part.labels) for part_logits, part in zip(rows, parts, strict=True)]
    torch.stack(losses).sum().backward()
    return [float(loss.detach()) for loss in losses]


def _diverged(run: Progress, loss: float, norm: float) -> str:
    rate = run.optimizer.param_groups[0]["lr"]
    return (
        f"{run.job.name}: loss {loss:g} and gradient norm {norm:g} at step {run.step + 1} of "
        f"{run.job.settings.steps} with learning rate {rate:g} (peak {run.job.settings.rate:g}); "
        "stopped, nothing of this step was kept: lower --lr, or let --sweep find one"
    )


@contextmanager
def example_adapters(model: PeftModel, names: Sequence[str]) -> Generator[None]:
    """Example i of the batch through adapter `names[i]`; FLoRA's, or plain LoRA's on linear layers.

    PEFT refuses `adapter_names` while a LoRA model trains, at the model's door alone: its layers' mixed forward is
    differentiable, so they are handed the names directly.
    """
    tuner = model.base_model
    if isinstance(tuner, FloraModel):
        with tuner.adapter_of_each_example(names):
            yield
        return
    assert isinstance(tuner, LoraModel), "mixed training is for FLoRA and LoRA"
    hook = partial(pass_on, adapter_names=list(names))
    layers = [m for m in tuner.modules() if isinstance(m, LoraLayer)]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss over the places whose label (N, L) counts, in nats, in float32."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up over the first 5 %, then a half cosine to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _keep(run: Progress, loss: float, save_every: int) -> None:
    run.step += 1
    run.losses.append(loss)
    if run.job.out is None:
        return
    log_row(run.job.out, {"step": run.step, "loss": loss, "rate": run.optimizer.param_groups[0]["lr"]})
    if run.is_done or (save_every and run.step % save_every == 0):
        _save(run)


def _save(run: Progress) -> None:
    if run.job.out is None or not run.step:
        return
    state: dict[str, Any] = {
        "step": run.step,
        "factors": {name: factor.detach().cpu() for name, factor in run.factors.items()},
        "optimizer": run.optimizer.state_dict(),
    }
    save_state(run.job.out, run.job.settings, state)


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Examples, batch: int) -> float:
    """Mean loss in nats per token over `examples`."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch):
        part = as_batch(examples[list(range(start, min(start + batch, len(examples))))], device)
        total += float(cross_entropy(model(**part.inputs).logits, part.labels)) * part.tokens
        tokens += part.tokens
    model.train(was_training)
    return total / tokens
