"""Models that pool: classifiers and embedders take adapters of their backbone, classifiers of their heads too."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import engine_support as support
import peft
import pytest
import torch
import transformers
from engine_support import Engine

import flora_vllm
from flora_vllm.training import FloraConfig

pytestmark = support.ENGINE_MARKS

PROMPTS = [support.prompt(length, seed=length) for length in (5, 12, 9)]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}
TOLERANCE = 1e-5  # of probabilities and of a unit vector's elements


def _saved(base: transformers.PreTrainedModel, path: Path, config: peft.PeftConfig) -> Any:
    """PEFT's model with random factors, saved at `path`; a head that PEFT saves of its own is left out of the file."""
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(path))
    return model


def _score(engine: Engine, adapter: Path | None, task: str) -> list[torch.Tensor]:
    prompts = [{"prompt_token_ids": list(p)} for p in PROMPTS]
    call = getattr(engine.llm, task)
    outputs = call(prompts, lora_request=engine.request_for(adapter), use_tqdm=False)
    return [torch.tensor(o.outputs.probs if task == "classify" else o.outputs.embedding) for o in outputs]


def _agree(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=TOLERANCE, rtol=0) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def _probabilities(model: Any) -> list[torch.Tensor]:
    return [model(torch.tensor([list(p)])).logits[0].softmax(-1) for p in PROMPTS]


@torch.no_grad()
def _embeddings(model: Any) -> list[torch.Tensor]:
    last = [model(torch.tensor([list(p)])).last_hidden_state[0, -1] for p in PROMPTS]
    return [torch.nn.functional.normalize(row, dim=-1) for row in last]


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Engine]:
    """Of the model that the test names; one at a time."""
    # Embedders compare texts too, for which vLLM wants the tokenizer.
    with support.running(tiny_model(request.param), runner="pooling", max_loras=7, skip_tokenizer_init=False) as engine:
        yield engine


CLASSIFIER = pytest.mark.parametrize("engine", ["classifier"], indirect=True)


def _load_classifier(path: Path) -> transformers.PreTrainedModel:
    return transformers.Qwen2ForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()


@CLASSIFIER
def test_a_classifiers_backbone_is_adapted_and_its_head_left_alone(engine, tiny_model, tmp_path):
    base = _load_classifier(tiny_model("classifier"))
    plain = _probabilities(base)
    adapted = _probabilities(_saved(base, tmp_path / "lora", peft.LoraConfig(**LORA)))
    assert not _agree(plain, adapted)
    assert _agree(_score(engine, tmp_path / "lora", "classify"), adapted)
    assert _agree(_score(engine, None, "classify"), plain)


HEADS = {
    "saved": peft.LoraConfig(**LORA, task_type="SEQ_CLS"),  # PEFT names score and classifier in modules_to_save
    "saved with a bias": peft.LoraConfig(**LORA, modules_to_save=["score"]),
    "adapted": peft.LoraConfig(r=2, target_modules=["q_proj", "score"]),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["score"]),
    "flora": FloraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS"),
    "backbone": peft.LoraConfig(**LORA),
}


def _with_heads(tiny_model: Callable[[str], Path], folder: Path) -> dict[Path | None, Any]:
    """Folder -> PEFT's model of it, and the base; what is saved whole has random numbers."""
    models: dict[Path | None, Any] = {None: _load_classifier(tiny_model("classifier"))}
    for seed, (name, config) in enumerate(HEADS.items()):
        base = _load_classifier(tiny_model("classifier"))
        if "bias" in name:
            base.score.bias = torch.nn.Parameter(torch.zeros(base.config.num_labels))
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(folder / name))
        models[folder / name] = model
    return models


@CLASSIFIER
def test_heads_of_one_batch_are_each_requests_own(engine, tiny_model, tmp_path):
    """Saved whole, adapted and left alone; each as PEFT computes it."""
    models = _with_heads(tiny_model, tmp_path)
    adapters = [*models, *reversed(models)]
    prompts = [support.prompt(4 + 3 * i, seed=i) for i in range(len(adapters))]
    asked = [{"prompt_token_ids": list(p)} for p in prompts]
    requests = [engine.request_for(adapter) for adapter in adapters]
    found = engine.llm.classify(asked, lora_request=requests, use_tqdm=False)
    for adapter, prompt, output in zip(adapters, prompts, found, strict=True):
        with torch.no_grad():
            wanted = models[adapter](torch.tensor([list(prompt)])).logits[0].softmax(-1)
        assert torch.allclose(torch.tensor(output.outputs.probs), wanted, atol=TOLERANCE, rtol=0), adapter
    alone = engine.llm.classify(asked[1], lora_request=requests[1], use_tqdm=False)[0]
    assert torch.allclose(torch.tensor(alone.outputs.probs), torch.tensor(found[1].outputs.probs), atol=TOLERANCE)


@CLASSIFIER
def test_a_saved_head_that_does_not_fit_is_refused_by_name(engine, tiny_model, tmp_path):
    base = transformers.Qwen2ForSequenceClassification.from_pretrained(
        tiny_model("classifier"), num_labels=5, ignore_mismatched_sizes=True
    )
    _saved(base, tmp_path / "head", peft.LoraConfig(**LORA, modules_to_save=["score"]))
    with pytest.raises(flora_vllm.AdapterError, match=r"'score' is saved whole .*another size \(weight \(5,"):
        _score(engine, tmp_path / "head", "classify")


@CLASSIFIER
def test_an_activated_adapter_of_the_head_is_refused_and_one_of_the_backbone_is_not(engine, tiny_model, tmp_path):
    """By token the head would be the adapter's before its invocation, too."""
    kinds = {"backbone": ["q_proj"], "head": ["q_proj", "score"]}
    for name, targets in kinds.items():
        config = peft.LoraConfig(r=2, target_modules=targets, alora_invocation_tokens=[7, 9])
        _saved(_load_classifier(tiny_model("classifier")), tmp_path / name, config)
    plain = _score(engine, None, "classify")
    assert _agree(_score(engine, tmp_path / "backbone", "classify"), plain), "no prompt has its invocation"
    with pytest.raises(flora_vllm.AdapterError, match=r"score: alora_invocation_tokens: rows .* classifier's head"):
        _score(engine, tmp_path / "head", "classify")


@CLASSIFIER
def test_a_step_on_other_rows_fails_its_pooling_requests_and_no_others(engine, tiny_model, tmp_path, monkeypatch):
    """What a layer that nobody found out at start would do; the right value comes back with the layer."""
    base = _load_classifier(tiny_model("classifier"))
    plain = _probabilities(base)
    adapted = _probabilities(_saved(base, tmp_path / "lora", peft.LoraConfig(**LORA)))
    layer = engine.model().get_submodule("model.layers.1.mlp.down_proj")
    forward = layer.forward

    def in_parts(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat([forward(x[:2])[0], forward(x[2:])[0]]), None

    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", in_parts)
        with pytest.raises(flora_vllm.StepError, match="parts of the batch"):
            _score(engine, tmp_path / "lora", "classify")
        assert _agree(_score(engine, None, "classify"), plain)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert _agree(_score(engine, tmp_path / "lora", "classify"), adapted)


@pytest.mark.parametrize(("engine", "kind"), [("embedder", "embedder"), ("qwen2", "qwen2")], indirect=["engine"])
def test_a_headless_adapter_fits_an_embedder_saved_with_and_without_head(engine, kind, tiny_model, tmp_path):
    base = transformers.Qwen2Model.from_pretrained(tiny_model(kind), attn_implementation="eager").eval()
    plain = _embeddings(base)
    adapted = _embeddings(_saved(base, tmp_path / "lora", peft.LoraConfig(**LORA)))
    assert _agree(_score(engine, tmp_path / "lora", "embed"), adapted)
    assert _agree(_score(engine, None, "embed"), plain)
