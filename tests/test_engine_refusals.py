"""What cannot be served is refused when it is loaded, by name, and the engine serves everybody else as before."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import engine_support as support
import peft
import pytest
import torch
from engine_support import Answer, Ask, Engine
from safetensors.torch import load_file, save_file
from tiny_models import WIDTH

import flora_vllm

pytestmark = support.ENGINE_MARKS

Q_PROJ = "model.layers.0.self_attn.q_proj"
PROMPT = support.prompt(9, seed=0)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path]) -> Iterator[Engine]:
    with support.running(tiny_model("llama"), max_loras=2, max_lora_rank=8, max_flora_rank=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def good(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good"
    support.write_flora_adapter(support.load(tiny_model("llama")), path, 2, "mean", seed=1)
    return path


@pytest.fixture(scope="module")
def expected(engine: Engine, good: Path) -> list[Answer]:
    return engine.ask([Ask(PROMPT, good), Ask(PROMPT)])


def _flora(path: Path, *, module: str = Q_PROJ, rank: int = 2, shape: tuple[int, int] = (WIDTH, WIDTH)) -> None:
    flora_vllm.write_flora(path, {module: (torch.ones(rank, shape[1]), torch.ones(shape[0], rank))})


def _change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _not_a_number(path: Path, _model: Path) -> None:
    _flora(path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{Q_PROJ}.flora_A.weight"][1, 3] = torch.nan

    _change_tensors(path, spoil)


def _without_partner(path: Path, _model: Path) -> None:
    _flora(path)
    _change_tensors(path, lambda tensors: tensors.pop(f"base_model.model.{Q_PROJ}.flora_B.weight"))


def _unknown_key(path: Path, _model: Path) -> None:
    _flora(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flora_magic": 3}))


def _torn(path: Path, _model: Path) -> None:
    _flora(path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _peft(**options) -> Callable[[Path, Path], None]:
    def save(path: Path, model: Path) -> None:
        peft.get_peft_model(support.load(model), peft.LoraConfig(**options)).save_pretrained(str(path))

    return save


def _with_larger_vocabulary(path: Path, model: Path) -> None:
    _peft(target_modules=["q_proj"], modules_to_save=["lm_head"])(path, model)
    name = "base_model.model.lm_head.weight"
    _change_tensors(path, lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)}))


def _another_family(path: Path, _model: Path) -> None:
    _flora(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LILY"}))


# name -> (what writes it, what the one message must say)
BAD: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "embed_tokens": (
        lambda path, _: support.write_unchecked(
            path, {"model.embed_tokens": (torch.ones(2, WIDTH), torch.ones(512, 2))}
        ),
        ("'model.embed_tokens' is an embedding, which only LoRA and DoRA",),
    ),
    "saved whole": (_with_larger_vocabulary, ("'lm_head' is saved whole", "of another size")),
    "another family": (_another_family, ("LILY", "is not supported yet")),
    "another depth": (
        lambda path, _: _flora(path, module="model.layers.7.self_attn.q_proj"),
        ("model.layers.7.self_attn.q_proj", "another model"),
    ),
    "another width": (lambda path, _: _flora(path, shape=(WIDTH, 64)), (Q_PROJ, "another model")),
    "NaN": (_not_a_number, ("flora_A", "NaN")),
    "no partner": (_without_partner, ("flora_B", "missing")),
    "unknown key": (_unknown_key, ("flora_magic",)),
    "torn": (_torn, ("adapter_model.safetensors",)),
    "FLoRA rank": (lambda path, _: _flora(path, rank=5), ("rank 5", "limit 4", "--max-flora-rank")),
    "LoRA rank": (
        _peft(target_modules=["q_proj"], r=16),
        ("rank 16", "limit 8", "is greater than max_lora_rank 8", "--max-lora-rank"),
    ),
    "empty": (lambda path, _: path.mkdir(), ("adapter_config.json",)),
    "absent": (lambda *_: None, ("does not exist",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_by_name_and_others_are_served(engine, good, expected, tiny_model, tmp_path, name):
    write, said = BAD[name]
    path = tmp_path / f"bad {name}"
    write(path, tiny_model("llama"))
    known = engine.manager().list_adapters().keys()
    # Others are already queued when the faulty one arrives.
    with pytest.raises(flora_vllm.AdapterError, match=f"bad {name}") as refusal:
        engine.ask([Ask(PROMPT, good), Ask(PROMPT, path), Ask(PROMPT)])
    for pattern in said:
        assert refusal.match(pattern)
    assert engine.manager().list_adapters().keys() == known
    assert not engine.llm.llm_engine.has_unfinished_requests(), "the refused request or its neighbours are still queued"
    for answer, wanted in zip(engine.ask([Ask(PROMPT, good), Ask(PROMPT)]), expected, strict=True):
        assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE


def test_all_faults_come_at_once(engine, tmp_path):
    path = tmp_path / "worst"
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = dict.fromkeys(
        (Q_PROJ, "model.layers.9.mlp.up_proj", "lm_head"), (torch.ones(5, WIDTH), torch.ones(32, 5))
    )
    support.write_unchecked(path, parts)
    with pytest.raises(flora_vllm.AdapterError, match="4 faults") as refusal:
        engine.ask([Ask(PROMPT, path)])
    for pattern in ("rank 5 is above the limit 4", "layers.9", "lm_head", r"shape \(32, 5\)"):
        assert refusal.match(f"(?s).*{pattern}")


def test_a_model_run_past_the_op_fails_the_requests_it_did_not_serve_and_no_others(engine, good, expected, monkeypatch):
    """A layer whose quant method was put back, or a replayed graph: the step's output must not be used, and what it
    left in the prefix cache is not the adapter's."""
    long = support.prompt(200, seed=1)
    alone = [engine.ask([Ask(long, path)])[0] for path in (good, None)]
    engine.llm.llm_engine.reset_prefix_cache()
    manager = engine.manager()
    with monkeypatch.context() as patched:
        for name, layer in manager.attached.layers.items():

            def bypass(_layer, x, bias=None, kernel=layer.kernel):
                return kernel.forward(x, bias, None)

            patched.setattr(manager.model.get_submodule(name).quant_method, "apply", bypass)
        assert support.difference(engine.ask([Ask(PROMPT)])[0], expected[1]) < support.LOGPROB_TOLERANCE
        with pytest.raises(flora_vllm.StepError, match="output is the base model's"):
            engine.ask([Ask(long, good), Ask(long)])
    assert not engine.llm.llm_engine.has_unfinished_requests()
    for path, wanted in zip((good, None), alone, strict=True):
        assert support.difference(engine.ask([Ask(long, path)])[0], wanted) < support.LOGPROB_TOLERANCE


def test_new_weights_are_refused_where_the_old_are_packed_and_nothing_has_changed(engine, good, expected):
    """Half way through vLLM would meet an empty one, and have no model any more."""
    for call in ("reload_weights", "start_weight_update", lambda worker: worker.reload_weights()):
        with pytest.raises(flora_vllm.errors.ConfigError, match=r"'model.layers.0.*' is packed for the CPU; start"):
            engine.llm.collective_rpc(call)
    engine.llm.reset_prefix_cache()
    assert engine.ask([Ask(PROMPT, good), Ask(PROMPT)]) == expected
