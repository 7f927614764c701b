"""Adapters with a known merge, and a vLLM engine in this process, for the tests that start an engine.

An engine in this process starts in seconds (vLLM is imported once) and its errors arrive as they are. Answers are
judged teacher-forced: the oracle reads the whole answer at once, and at each place its most likely token must be
the one that was served, which for greedy decoding is the same as generating from the oracle.
"""

import contextlib
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import SPECIAL, VOCABULARY

import flora_vllm

# vLLM and what it imports warn in this process.
ENGINE_MARKS = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# Float32 through 2 layers: kernels sum in another order than the oracle; the bound.
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """What one request got: its tokens, and at each place the most likely tokens with their logprobs."""

    tokens: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    adapter: Path | None = None


class Engine:
    """A running engine; adapters are named by their directory, each directory is one adapter with a permanent id."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._ids: dict[Path, int] = {}

    def request_for(self, adapter: Path | None) -> Any:
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        number = self._ids.setdefault(adapter, len(self._ids) + 1)
        return LoRARequest(adapter.name, number, str(adapter))

    def ask(self, asks: Sequence[Ask], tokens: int = 8) -> list[Answer]:
        """Serve all of `asks` in one batch, greedily; answers in the same order."""
        prompts = [{"prompt_token_ids": list(a.prompt)} for a in asks]
        return self.generate(prompts, [a.adapter for a in asks], tokens)

    def generate(self, prompts: Sequence[Any], adapters: Sequence[Path | None], tokens: int) -> list[Answer]:
        """The same for prompts of any form that vLLM takes."""
        import vllm

        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, detokenize=False, ignore_eos=True)
        requests = [self.request_for(adapter) for adapter in adapters]
        outputs = self.llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        return [_answer(output.outputs[0]) for output in outputs]

    def manager(self) -> Any:
        """The worker's model manager (slots, caches)."""
        return self._runner().lora_manager._adapter_manager

    def model(self) -> torch.nn.Module:
        """The worker's model."""
        return self._runner().model

    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def _runner(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _answer(output: Any) -> Answer:
    places = tuple({token: entry.logprob for token, entry in place.items()} for place in output.logprobs)
    return Answer(tuple(output.token_ids), places)


_running: list[Path] = []


@contextlib.contextmanager
def running(model: Path, *, flora: bool = True, own_process: bool = False, **options: Any) -> Iterator[Engine]:
    """An engine serving `model` in float32; with `flora` False it is plain vLLM without adapters.

    It runs in this process, where tests can look into it, unless `own_process`.
    """
    assert not _running, "vLLM keeps its process groups in globals: one engine at a time"
    with mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process))}):
        import vllm
        from vllm.distributed import cleanup_dist_env_and_memory

        settings: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 64 << 20,
            "skip_tokenizer_init": True,
            "max_num_seqs": 64,
        }
        make: Callable[..., Any] = flora_vllm.LLM if flora else vllm.LLM
        llm = make(model=str(model), **(settings | options))
        _running.append(model)
        try:
            yield Engine(llm)
        finally:
            _running.clear()
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(
        torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


def load(model: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(model)
    kind: Any = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSpeechSeq2Seq
    elif hasattr(config, "vision_config"):
        kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(model, attn_implementation="eager").eval()


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every linear layer an adapter may change: all but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "proj_out")
    }


State = Mapping[str, torch.Tensor]


def write_flora_adapter(
    model: torch.nn.Module, path: Path, rank: int, reduction: str, seed: int, modules: Sequence[str] | None = None
) -> State:
    """A FLoRA adapter at `path` for `modules` (all if None); the weights it amounts to.

    Products of the factors scatter around 1 by about a half whatever the rank and the reduction: far from the
    identity, and no layer's output grows or vanishes.
    """
    g = torch.Generator().manual_seed(seed)
    scale = 1 / rank if reduction == "mean" else 1.0
    factors, merged = {}, dict(model.state_dict())
    for name, module in linear_modules(model).items():
        if modules is None or name in modules:
            a = 1 + 0.5 * torch.randn(rank, module.in_features, generator=g)
            b = (1 + 0.5 * torch.randn(module.out_features, rank, generator=g)) / (rank * scale)
            factors[name] = (a, b)
            merged[f"{name}.weight"] = module.weight.detach() * (b @ a) * scale
    flora_vllm.write_flora(path, factors, reduction=reduction)
    return merged


def write_unchecked(path: Path, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A FLoRA directory as another program might write it: with modules that our writer refuses."""
    path.mkdir()
    rank = next(iter(modules.values()))[0].shape[0]
    config = {"peft_type": "FLORA", "r": rank, "target_modules": sorted(modules)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.flora_{part}.weight": factor.clone()
        for name, pair in modules.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")


def save_peft_adapter(base: Path, path: Path, config: Any, seed: int) -> State:
    """An adapter of PEFT's with random factors, saved by PEFT at `path`; the weights of PEFT's own merge."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "ia3" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
            else:
                # Products of two HiRA factors scatter by 0.6 around the 1 they are added to, those of two LoRA
                # factors, scaled, about as much as the weights themselves.
                torch.nn.init.normal_(parameter, std=(0.6**2 / config.r) ** 0.25 if "hira" in name else 0.14)
    model.save_pretrained(str(path))
    return model.merge_and_unload().state_dict()


def write_every_family(model: Path, folder: Path) -> dict[str, Path]:
    """Adapters of the Llama at `model`, name -> directory: FLoRA of ranks 1 to 8, both reductions, LoRA, IA3, HiRA."""
    configs = {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
        "rslora": peft.LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear"),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "hira": peft.HiraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]),
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_peft_adapter(model, folder / name, config, seed)
    base = load(model)
    for rank in range(1, 9):
        write_flora_adapter(base, folder / f"flora-{rank}", rank, ("mean", "sum")[rank % 2], seed=rank)
    return {name: folder / name for name in [*configs, *(f"flora-{rank}" for rank in range(1, 9))]}


class Oracle:
    """transformers on given weights; None leaves `model` as it is."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model

    @torch.no_grad()
    def logprobs(self, state: State | None, tokens: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary) float64 logprobs of what follows each token."""
        if state is not None:
            self._model.load_state_dict(dict(state))
        logits = self._model(torch.tensor([list(tokens)])).logits[0]
        return torch.log_softmax(logits.double(), -1)

    def greedy(self, state: State, prompt: Sequence[int], new: int) -> tuple[int, ...]:
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(int(self.logprobs(state, tokens)[-1].argmax()))
        return tuple(tokens[len(prompt) :])

    def error(self, state: State | None, ask: Ask, answer: Answer) -> float:
        """Largest difference of a logprob; infinite if a served token is not the oracle's choice."""
        whole = self.logprobs(state, ask.prompt + answer.tokens)[len(ask.prompt) - 1 : -1]
        if answer.tokens != tuple(whole.argmax(-1).tolist()):
            return math.inf
        return max(
            abs(value - float(place[token]))
            for place, served in zip(whole, answer.logprobs, strict=True)
            for token, value in served.items()
        )


def oracle_of(base: Path) -> Oracle:
    """In float64, so that the differences are the engine's alone."""
    return Oracle(load(base).double())


def difference(one: Answer, other: Answer) -> float:
    """Largest difference of a logprob that both report; fails if the tokens differ."""
    assert one.tokens == other.tokens, f"tokens differ: {one.tokens} and {other.tokens}"
    worst = 0.0
    for here, there in zip(one.logprobs, other.logprobs, strict=True):
        shared = here.keys() & there.keys()
        # Neighbours in rank may swap; the two most likely cannot both be missing.
        assert len(shared) >= 3, f"most likely tokens differ: {sorted(here)} and {sorted(there)}"
        worst = max(worst, *(abs(here[token] - there[token]) for token in shared))
    return worst
