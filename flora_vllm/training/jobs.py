"""Many adapters in one batch over one frozen base, each example through its own: `flora-vllm train --jobs FILE`.

A step reads the base model's weights once for all jobs; the losses, seeds and batches of each job are those it has
when trained alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import PreTrainedModel

from flora_vllm.errors import ConfigError
from flora_vllm.options import from_mapping
from flora_vllm.train_request import Request
from flora_vllm.training.build import METHODS, add_adapter, load_base, parse_targets
from flora_vllm.training.checkpoint import check_out, forget, load_state
from flora_vllm.training.data import as_batch
from flora_vllm.training.learning_rate import warn_if_lora_sized
from flora_vllm.training.loop import Job, backward, held_out_loss, train
from flora_vllm.training.run import (
    Bar,
    Measured,
    measure_and_publish,
    read_blocks,
    settings_of,
    tell_what_is_done,
)
from flora_vllm.training.speech import is_speech_model

# One batch holds all jobs' examples, so these are the file's, not a job's.
SHARED = ("base", "length")
# What is no option but must be said.
PLACES = ("base", "data", "out")


@dataclass(frozen=True)
class Report:
    """`seconds`: the steps together; `alone_s`: the same steps one job after another, from timed steps."""

    measured: dict[Path, Measured]
    seconds: float
    alone_s: float


def read_jobs(path: Path) -> list[Request]:
    """The requests in a jobs file: `base`, `jobs` (a list of objects with `data` and `out`), and any option of
    `flora-vllm train` either for all jobs or inside one. Raises ConfigError with every fault.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"jobs file {path} can't be read: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list) or not document["jobs"]:
        raise ConfigError(f"jobs file {path}: needs base: MODEL and jobs: a list of objects with data and out")
    common = {key: value for key, value in document.items() if key != "jobs"}
    requests, faults = [], []
    writers: dict[Path, list[str]] = {}  # by the directory itself, which has many spellings
    for number, job in enumerate(document["jobs"], start=1):
        try:
            requests.append(_request(common, job))
            writers.setdefault(Path(os.path.realpath(requests[-1].out)), []).append(str(number))
        except ConfigError as error:
            faults.append(f"job {number}: {error}")
    faults += [f"jobs {' and '.join(them)} write to {out}" for out, them in writers.items() if len(them) > 1]
    if faults:
        raise ConfigError(f"jobs file {path}:\n  " + "\n  ".join(faults))
    return requests


def _request(common: dict[str, Any], job: object) -> Request:
    if not isinstance(job, dict):
        raise ConfigError(f"is {job!r}, must be an object with data and out")
    if shared := sorted(set(SHARED) & set(job)):
        raise ConfigError(f"{', '.join(shared)} must be the same for all jobs; move it to the top of the file")
    values = {**common, **job}
    if missing := [name for name in PLACES if not isinstance(values.get(name), str)]:
        raise ConfigError(f"{', '.join(missing)} must be given as text")
    if values.get("method", "flora") != "flora":
        raise ConfigError("only method flora can train in a shared batch; PEFT's own methods refuse to")
    options = {name: value for name, value in values.items() if name not in PLACES}
    places = {"base": values["base"], "data": Path(values["data"]), "out": Path(values["out"])}
    return from_mapping(Request, options, "it", **places)


def train_together(requests: Sequence[Request], *, restart: bool = False) -> Report:
    """Train all requests in shared batches and publish each adapter; `restart`: see `train_one`."""
    for request in requests:
        check_out(request.out)
    if is_speech_model(requests[0].base):
        raise ConfigError(
            f"{requests[0].base} is a Whisper, and jobs are for text models; train its adapters one by one"
        )
    model, tokenizer = load_base(requests[0].base)
    dtype = next(model.parameters()).dtype
    blocks = [read_blocks(request, tokenizer) for request in requests]
    settings = [settings_of(r, b, r.rate) for r, b in zip(requests, blocks, strict=True)]
    for request in requests:
        warn_if_lora_sized(request.rate)
    bases = [held_out_loss(model, b.held_out, r.batch) for r, b in zip(requests, blocks, strict=True)]
    adapted = attach_all(requests, model)
    if restart:
        for request in requests:
            forget(request.out)
    jobs = [Job(job_name(i), s, b, r.out) for i, (r, s, b) in enumerate(zip(requests, settings, blocks, strict=True))]
    for request, setting in zip(requests, settings, strict=True):
        tell_what_is_done(request.out, setting)
    alone_s = sum(_seconds_of_a_step(adapted, job) * _steps_left(job) for job in jobs)
    adapted.set_requires_grad([job.name for job in jobs])
    start = perf_counter()
    with Bar(max(map(_steps_left, jobs)), 0, f"training {len(jobs)} adapters") as bar:
        train(adapted, jobs, save_every=min(r.save_every for r in requests), seen=bar.seen)
    seconds = perf_counter() - start
    measured = {}
    for job, request, b, base in zip(jobs, requests, blocks, bases, strict=True):
        adapted.set_adapter(job.name)
        measured[request.out] = measure_and_publish(request, adapted, job.name, dtype, b, base)
    return Report(measured, seconds, alone_s)


def job_name(index: int) -> str:
    return f"job{index}"


def attach_all(requests: Sequence[Request], model: PreTrainedModel) -> PeftModel:
    """One adapter per request, named by `job_name`, each initialised as it would be alone."""
    adapted: PeftModel | None = None
    for index, request in enumerate(requests):
        torch.manual_seed(request.seed)
        config = METHODS["flora"](
            request.rank, parse_targets(request.targets, model.config.model_type), model.config.model_type
        )
        if adapted is None:
            adapted = add_adapter(model, config, job_name(index))
        else:
            adapted.add_adapter(job_name(index), config)
    assert adapted is not None, "no requests"
    return adapted


def _steps_left(job: Job) -> int:
    state = load_state(job.out, job.settings) if job.out is not None else None
    return job.settings.steps - (state["step"] if state is not None else 0)


def _seconds_of_a_step(adapted: PeftModel, job: Job) -> float:
    """Forward and backward of one batch of this job alone; the second of two, the first warms up."""
    adapted.set_adapter(job.name)
    rows = list(range(min(job.settings.batch, len(job.blocks.train))))
    batch = as_batch(job.blocks.train[rows], next(adapted.parameters()).device)
    seconds = 0.0
    for _ in range(2):
        start = perf_counter()
        backward(adapted, [batch])
        seconds = perf_counter() - start
        adapted.zero_grad(set_to_none=True)
    return seconds
