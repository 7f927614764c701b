"""Each architecture serves every family, rank, reduction and choice of modules in one engine and one mixed batch.

The oracle is transformers on merged weights: W ∘ (B A) c for FLoRA, PEFT's own merge for LoRA, IA3 and HiRA.
"""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import engine_support as support
import peft
import pytest
from engine_support import Answer, Ask, Oracle, State
from tiny_models import TINY_MODELS

import flora_vllm
from flora_vllm.terms import Product

pytestmark = support.ENGINE_MARKS

RANKS = (1, 2, 5, 8)
REDUCTIONS = ("mean", "sum")

# architecture -> modules that the "some" adapters change.
SOME = {
    "llama": ("q_proj", "v_proj", "gate_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "gate_proj", "down_proj"),
    "phi3": ("qkv_proj", "down_proj"),
    "gptbigcode": ("attn.c_attn", "mlp.c_proj"),
}
_SPLIT = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    "rslora": peft.LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3-all": peft.IA3Config(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        feedforward_modules=["o_proj", "gate_proj"],
    ),
    "hira": peft.HiraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]),
}
PEFT_CONFIGS = {
    "llama": _SPLIT,
    "qwen2": _SPLIT,
    "phi3": {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "gate_up_proj", "down_proj"]),
        "ia3": peft.IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "hira": peft.HiraConfig(r=3, target_modules=["qkv_proj", "gate_up_proj"]),
    },
    "gptbigcode": {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"]),
        "ia3": peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        "hira": peft.HiraConfig(r=3, target_modules=["c_attn", "c_proj"]),
    },
}
FLORA_LABELS = tuple(
    f"flora-r{rank}-{reduction}-{part}" for rank in RANKS for reduction in REDUCTIONS for part in ("all", "some")
)
# vLLM's Transformers backend changes transformers' own classes, which the oracle needs as they are.
OWN_PROCESS = {"gptbigcode"}
MERGED = "flora-r5-mean-all"
SHARED_PROMPT = support.prompt(11, seed=1)


@dataclass
class Served:
    """Everything one architecture's batch returned. The first answer of each label is to the prompt all share."""

    architecture: str
    model: Path
    oracle: Oracle
    states: dict[str, State] = field(default_factory=dict)
    answers: dict[str, list[tuple[Ask, Answer]]] = field(default_factory=dict)


def _write_adapters(served: Served, folder: Path) -> dict[str, Path | None]:
    paths: dict[str, Path | None] = {"base": None}
    base = support.load(served.model)
    served.states["base"] = base.state_dict()
    some = [n for n in support.linear_modules(base) if n.endswith(SOME[served.architecture])]
    for seed, label in enumerate(FLORA_LABELS):
        _, rank, reduction, part = label.split("-")
        paths[label] = folder / label
        modules = None if part == "all" else some
        served.states[label] = support.write_flora_adapter(
            base, folder / label, int(rank[1:]), reduction, seed + 100, modules
        )
    for seed, (label, config) in enumerate(PEFT_CONFIGS[served.architecture].items()):
        paths[label] = folder / label
        served.states[label] = support.save_peft_adapter(served.model, folder / label, config, seed + 200)
    return paths


@pytest.fixture(scope="module", params=list(SOME))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return _serve(request.param, tmp_path_factory.mktemp(request.param))


def _serve(architecture: str, folder: Path) -> Served:
    model = TINY_MODELS[architecture](folder / "model")
    served = Served(architecture, model, support.oracle_of(model))
    paths = _write_adapters(served, folder)
    asks = [(label, Ask(SHARED_PROMPT, path)) for label, path in paths.items()]
    asks += [(label, Ask(support.prompt(5 + i, seed=i), path)) for i, (label, path) in enumerate(paths.items())]
    options = {"max_loras": len(paths) - 1, "max_lora_rank": 8, "own_process": architecture in OWN_PROCESS}
    with support.running(model, max_flora_rank=8, **options) as engine:
        for (label, ask), answer in zip(asks, engine.ask([ask for _, ask in asks]), strict=True):
            served.answers.setdefault(label, []).append((ask, answer))
    return served


def test_adapters_in_a_mixed_batch_are_their_merged_weights(served, record_property):
    errors = {
        label: max(served.oracle.error(served.states[label], ask, answer) for ask, answer in answers)
        for label, answers in served.answers.items()
    }
    record_property("worst", max(errors.values()))
    assert len(errors) == 1 + len(FLORA_LABELS) + len(PEFT_CONFIGS[served.architecture])
    assert not {label: error for label, error in errors.items() if error >= support.LOGPROB_TOLERANCE}


def test_the_adapters_are_told_apart(served):
    """Were two of them alike, a mix-up of their slots would go unseen: logprobs must differ 1000 times the bound."""
    first = {label: served.oracle.logprobs(state, SHARED_PROMPT)[-1] for label, state in served.states.items()}
    for one, other in combinations(first, 2):
        gap = float((first[one] - first[other]).abs().max())
        assert gap > 1000 * support.LOGPROB_TOLERANCE, f"{one} and {other} differ by {gap:.1e} only"
    tokens = {answers[0][1].tokens for answers in served.answers.values()}
    assert len(tokens) > len(served.answers) * 0.9, "most adapters should answer the shared prompt in their own way"


def test_the_merged_checkpoint_in_plain_vllm_answers_alike(served, tmp_path):
    merged = support.load(served.model)
    merged.load_state_dict(dict(served.states[MERGED]))
    merged.save_pretrained(tmp_path)
    with support.running(tmp_path, flora=False, own_process=served.architecture in OWN_PROCESS) as engine:
        answers = engine.ask([Ask(ask.prompt) for ask, _ in served.answers[MERGED]])
    for (_, adapted), plain in zip(served.answers[MERGED], answers, strict=True):
        assert support.difference(adapted, plain) < support.LOGPROB_TOLERANCE


def test_swapping_the_two_factors_is_noticed(tmp_path):
    """On a square layer both orders of the factors fit, so only the numbers can tell; elsewhere the shapes do."""
    model = TINY_MODELS["llama"](tmp_path / "model")
    oracle = support.oracle_of(model)
    base = support.load(model)
    square = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    right = support.write_flora_adapter(base, tmp_path / "right", 3, "mean", seed=9, modules=square)
    factors = {name: _factors(tmp_path / "right", name) for name in square}
    flora_vllm.write_flora(tmp_path / "swapped", {name: (b.T, a.T) for name, (a, b) in factors.items()})
    support.write_flora_adapter(base, tmp_path / "all", 3, "mean", seed=9)
    oblong = _factors(tmp_path / "all", "model.layers.0.self_attn.k_proj")
    flora_vllm.write_flora(tmp_path / "oblong", {"model.layers.0.self_attn.k_proj": (oblong[1].T, oblong[0].T)})
    asks = [Ask(SHARED_PROMPT, tmp_path / "right"), Ask(SHARED_PROMPT, tmp_path / "swapped")]
    with support.running(model, max_loras=2) as engine:
        as_written, swapped = engine.ask(asks, tokens=1)
        with pytest.raises(flora_vllm.AdapterError, match="trained on another model"):
            engine.ask([Ask(SHARED_PROMPT, tmp_path / "oblong")])
    assert oracle.error(right, asks[0], as_written) < support.LOGPROB_TOLERANCE
    expected = oracle.logprobs(right, SHARED_PROMPT)[-1]
    gap = max(abs(value - float(expected[token])) for token, value in swapped.logprobs[0].items())
    assert gap > 1000 * support.LOGPROB_TOLERANCE


def _factors(path: Path, module: str):
    (product,) = flora_vllm.read_adapter(path).modules[module].of(Product)
    return product.input, product.output
