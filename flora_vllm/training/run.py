"""One training run from request to published adapter; the command line and the jobs file both end here."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flora_vllm.errors import ConfigError
from flora_vllm.train_request import Request
from flora_vllm.training.build import METHODS, add_adapter, load_base, parse_targets
from flora_vllm.training.checkpoint import Settings, check_out, forget, load_state, log_row, publish_adapter
from flora_vllm.training.data import Blocks, Split, make_blocks, read_documents
from flora_vllm.training.learning_rate import warn_if_lora_sized
from flora_vllm.training.loop import DivergedError, Job, held_out_loss, train
from flora_vllm.training.speech import is_speech_model, load_speech_base, read_clips, split_clips

SWEEP_FACTORS, SWEEP_SHARE = (0.25, 0.5, 1.0, 2.0, 4.0), 0.1


@dataclass(frozen=True)
class Measured:
    """Held-out losses in nats per token; the adapter's with its factors rounded as they are published."""

    base: float
    adapter: float


def prepare(request: Request) -> tuple[PreTrainedModel, Split]:
    """The base model and the data, text for a language model and clips for a Whisper.

    Raises ConfigError, or AdapterError for an `out` that nothing can be published to.
    """
    check_out(request.out)
    if not is_speech_model(request.base):
        model, tokenizer = load_base(request.base)
        return model, read_blocks(request, tokenizer)
    base = load_speech_base(request.base)
    clips = read_clips(request.data, base, request.length)
    split = split_clips(clips, base, request.held_out, request.seed, str(request.data))
    spoken = ", ".join(sorted({clip.language or "en" for clip in clips}))
    print(f"{request.data}: {len(split.train)} clips to train on, {len(split.held_out)} held out ({spoken})")
    return base.model, split


def read_blocks(request: Request, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    documents = read_documents(request.data, tokenizer)
    blocks = make_blocks(documents, tokenizer, request.length, request.held_out, request.seed, str(request.data))
    print(
        f"{request.data}: {len(documents)} documents, {blocks.train.numel()} tokens to train on, "
        f"{blocks.held_out.numel()} held out"
    )
    return blocks


def settings_of(request: Request, blocks: Split, rate: float) -> Settings:
    epoch = -(-len(blocks.train) // request.batch)
    return Settings(
        base=request.base,
        method=request.method,
        rank=request.rank,
        targets=request.targets,
        data=str(request.data),
        tokens=blocks.train_tokens,
        length=request.length,
        batch=request.batch,
        steps=request.steps or max(1, round(epoch * (request.epochs or 1))),
        rate=rate,
        seed=request.seed,
    )


def attach(request: Request, model: PreTrainedModel) -> PeftModel:
    """The model with the request's adapter, initialised from its seed."""
    torch.manual_seed(request.seed)
    model_type = model.config.model_type
    config = METHODS[request.method](request.rank, parse_targets(request.targets, model_type), model_type)
    return add_adapter(model, config)


def sweep(
    request: Request,
    model: PreTrainedModel,
    blocks: Split,
    factors: Sequence[float] = SWEEP_FACTORS,
    share: float = SWEEP_SHARE,
) -> dict[float, float]:
    """A `share` of the run at each of the method's rate times `factors`: rate -> held-out loss, best first.

    Rates that diverge are left out. Raises ConfigError if all do.
    """
    settings = settings_of(request, blocks, request.rate)
    settings = replace(settings, steps=max(10, round(settings.steps * share)))
    losses: dict[float, float] = {}
    for factor in factors:
        rate = request.rate * factor
        adapted = attach(request, model)
        try:
            with Bar(settings.steps, 0, f"sweep {rate:g}") as bar:
                train(adapted, [Job("default", replace(settings, rate=rate), blocks)], seen=bar.seen)
            losses[rate] = held_out_loss(adapted, blocks.held_out, request.batch)
            print(f"sweep: rate {rate:g} gives held-out loss {losses[rate]:.4f} after {settings.steps} steps")
        except DivergedError:
            print(f"sweep: rate {rate:g} diverges")
        adapted.unload()
    if not losses:
        raise ConfigError(f"every rate of the sweep diverged on {request.data}; is the text what you meant?")
    return dict(sorted(losses.items(), key=lambda item: item[1]))


def train_one(
    request: Request, model: PreTrainedModel, blocks: Split, rate: float, *, restart: bool = False
) -> Measured:
    """Train, measure and publish one adapter; goes on from the state beside `request.out` if there is one.

    `restart`: forget that state, when nothing that was asked for can be wrong any more.
    """
    if request.method == "flora":
        warn_if_lora_sized(rate)
    settings = settings_of(request, blocks, rate)
    dtype = next(model.parameters()).dtype
    adapted = attach(request, model)
    adapted.print_trainable_parameters()
    if restart:
        forget(request.out)
    done = tell_what_is_done(request.out, settings)
    with adapted.disable_adapter():
        base = held_out_loss(adapted, blocks.held_out, request.batch)
    try:
        with Bar(settings.steps, done, "training") as bar:
            train(
                adapted, [Job("default", settings, blocks, request.out)], save_every=request.save_every, seen=bar.seen
            )
    except DivergedError as error:
        raise DivergedError(f"{error}. {kept(request.out, settings)}") from None
    return measure_and_publish(request, adapted, "default", dtype, blocks, base)


def tell_what_is_done(out: Path, settings: Settings) -> int:
    """Says what an earlier run has left to do; its steps. Raises ConfigError if it had other settings."""
    state = load_state(out, settings)
    done = 0 if state is None else state["step"]
    if done >= settings.steps:
        print(f"{out} holds this run, all {done} steps: nothing is left to train, at any rate; --restart trains anew")
    elif done:
        print(f"going on after step {done} of {settings.steps}")
    return done


def measure_and_publish(
    request: Request, adapted: PeftModel, name: str, dtype: torch.dtype, blocks: Split, base: float
) -> Measured:
    """Publish the adapter `name`, which is active, in the base model's dtype, and measure exactly that."""
    for key, parameter in adapted.named_parameters():
        if f".{name}." in f"{key}." and parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    measured = Measured(base, held_out_loss(adapted, blocks.held_out, request.batch))
    publish_adapter(adapted, request.out, name, dtype, request.base)
    log_row(request.out, {"held_out_base": measured.base, "held_out_adapter": measured.adapter})
    return measured


def kept(out: Path, settings: Settings) -> str:
    """What is left of a run that diverged, in words."""
    state = load_state(out, settings)
    if state is None:
        return "No checkpoint had been written yet"
    return f"The checkpoint after step {state['step']} was kept; the same command with a lower --lr goes on from it"


class Bar:
    """A progress bar over steps with the smoothed loss and tokens per second since this process began."""

    def __init__(self, steps: int, done: int, label: str, clock: Callable[[], float] = perf_counter) -> None:
        self._clock, self._start, self._tokens = clock, clock(), 0
        self._loss: float | None = None
        self._bar = tqdm(total=steps, initial=done, desc=label, unit="step", file=sys.stderr)

    def seen(self, losses: dict[str, float], tokens: int) -> None:
        loss = sum(losses.values()) / len(losses)
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._tokens += tokens
        rate = self._tokens / (self._clock() - self._start)
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, {rate:.0f} tokens/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
