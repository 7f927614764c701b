"""Every family served: all adapters of an architecture in one engine and one batch, against PEFT's own forward.

The adapters are those that the tests of the families' files make, fill and save; each must be served as PEFT computes
it, alone as in the batch, and leave nothing behind.
"""

import importlib
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import engine_support as support
import mixlora_support
import peft
import pytest
import torch
from engine_support import Answer, Ask, State
from families_support import Fill, fill_normal
from peft.tuners.lora.arrow import create_arrow_model
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS

from flora_vllm.commands.cli import main
from flora_vllm.formats import arrow
from flora_vllm.formats.families.table import ROWS, family_of
from flora_vllm.formats.lora_merges import read_part

pytestmark = support.ENGINE_MARKS

# Names of cases -> where they are; a case is (architecture, config) or (architecture, config, fill).
SOURCES = ("test_families", "test_families_low", "test_families_maps", "test_families_shared")
PROMPT = support.prompt(13, seed=5)
# Their tiny models have other sizes, or what is tested needs no engine.
LEFT_OUT = ("conv1d", "gpt2")
NEW = 4
# Maps across ranks: blocks that a cut would go through, outputs whose sum no rank has.
REFUSED_BY_TWO = {"road-1-bias", "road-2", "road-4"}
# PEFT computes in float32 too: what is compared is two roundings of the same sums, relative to what the adapter does.
TOLERANCE = 2e-4  # float32 rounding: of PiSSA, whose factors are as large as the weights, 1.1e-4 on one CPU
# Parameters, or those of a case, that would make PEFT's own rounding larger than that: OFT sums a map's
# powers; PEANuT moves logprobs by 16.
SMALLER = {"oft_R": 0.3, "lora-bdlora": 0.7, "lora-kasa": 0.7, "peanut": 0.8}


@dataclass
class Case:
    config: peft.PeftConfig
    fill: Fill
    task: str | None = None


@dataclass
class Served:
    model: Path
    paths: dict[str, Path] = field(default_factory=dict)
    answers: dict[str, list[tuple[Ask, Answer]]] = field(default_factory=dict)
    alone: dict[str, Answer] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)  # of adapters that PEFT does not know: their weights
    models: dict[str, torch.nn.Module] = field(default_factory=dict)  # of adapters that are no weights
    base_after: Answer | None = None


def cases_of(architecture: str) -> dict[str, Case]:
    if architecture == "gptbigcode":
        return {name: Case(config, fill_normal) for name, config in BIGCODE.items()}
    found: dict[str, Case] = {}
    for source in SOURCES:
        module = importlib.import_module(source)
        for name, case in module.CASES.items():
            values: tuple[Any, ...] = case if isinstance(case, tuple) else tuple(vars(case).values())
            where, config, *rest = values
            if where != architecture or any(word in name for word in LEFT_OUT) or (len(rest) > 2 and rest[2]):
                continue
            fill, task = (*rest, None, None)[:2]
            found[name] = Case(config() if callable(config) else config, fill or fill_normal, task)
    return found


TARGETS = ["c_attn", "c_fc"]
# StarCoder's architecture has fused attention, biases and other names: one of each kind of term.
BIGCODE = {
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "lora-bias": peft.LoraConfig(r=4, bias="lora_only", target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=3, target_modules=TARGETS, init_weights=False),
    "hra": peft.HRAConfig(r=4, target_modules=TARGETS),
    "oft": peft.OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS),
    "road": peft.RoadConfig(variant="road_1", group_size=32, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=16, target_modules=TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=40, scaling=100.0, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, target_modules=TARGETS, init_weights=False),
}


def write_outside(served: Served, folder: Path) -> None:
    """Systems that PEFT lacks, on one layer's queries, and the weights their equations give."""
    module = "model.layers.0.self_attn.q_proj"
    base = support.load(served.model).state_dict()
    width = base[f"{module}.weight"].shape[0]
    g = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=g)

    def write(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], delta: torch.Tensor) -> None:
        path = folder / name
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({"target_modules": [module], **config}))
        save_file({f"base_model.model.{module}.{k}": v.contiguous() for k, v in tensors.items()},
                  path / "adapter_model.safetensors")  # fmt: skip
        served.paths[name] = path
        served.states[name] = {**base, f"{module}.weight": base[f"{module}.weight"] + delta}

    downs, ups = [random(rank, width // 2) for rank in (2, 3)], [random(width // 2, rank) for rank in (2, 3)]
    tensors = {f"lora_A.{i}.weight": down for i, down in enumerate(downs)}
    tensors |= {f"lora_B.{i}.weight": up for i, up in enumerate(ups)}
    blocks = [alpha / len(down) * up @ down for alpha, down, up in zip((4, 5), downs, ups, strict=True)]
    write("melora", {"peft_type": "MELORA", "r": [2, 3], "lora_alpha": [4, 5]}, tensors, torch.block_diag(*blocks))

    down, up = random(3, width), random(width, 3)
    config = {"peft_type": "XGBLORA", "r": 1, "n_boosters": 3}
    write("xgblora", config, {"booster_A": down, "booster_B": up}, up @ down)

    down, core, parts, shares = random(1, 4, width), random(3, 4, 4), random(2, width, 4), random(3, 2)
    mixed = (torch.softmax(shares[1] / 0.7, 0)[:, None, None] * parts).sum(0)
    tensors = {"lora_A": down, "lora_lambdas": core, "lora_B": parts, "lora_B_w": shares}
    config = {"peft_type": "MTLLORA", "r": 4, "n_tasks": 3, "diagonal": False}
    write("mtl", config, tensors, 6 / 4 * mixed @ core[1] @ down[0])
    (folder / "mtl" / "flora_sidecar.json").write_text(json.dumps({"alpha": 6, "temperature": 0.7}))
    served.paths["mtl"] = Path(f"{folder / 'mtl'}#1")


def write_arrow(served: Served, folder: Path, name: str, targets: list[str]) -> None:
    """Three LoRAs among which tokens choose, and PEFT's model of them."""
    paths = [str(folder / f"{name}-{number}") for number in range(3)]
    for number, path in enumerate(paths):
        config = peft.LoraConfig(r=4, lora_alpha=2 + number, target_modules=targets)
        save(served.model, Case(config, partial(fill_normal, std=0.15)), Path(path), seed=number)
    served.paths[name] = folder / name
    parts = [read_part(1, path) for path in paths]
    arrow.write_arrow(served.paths[name], parts, (), arrow.Routing(top_k=2, temperature=0.7, seed=3))
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=3)
    served.models[name] = create_arrow_model(support.load(served.model), paths, config).eval().base_model


def write_meteora(served: Served, folder: Path) -> None:
    """A trained gate on one layer's outputs and one's queries, and the model with its equation beside them."""
    model = support.load(served.model)
    g = torch.Generator().manual_seed(12)
    tensors: dict[str, torch.Tensor] = {}
    alphas, rank = [2.0, 4.0, 6.0, 8.0], 3
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer: Any = model.get_submodule(module)
        out, into = layer.weight.shape
        gate, down, up = (0.2 * torch.randn(*shape, generator=g) for shape in ((4, into), (12, into), (out, 12)))
        tensors |= {f"{module}.moe_gate.weight": gate, f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}

        def add(_: Any, args: Any, y: torch.Tensor, gate=gate, down=down, up=up) -> torch.Tensor:
            x = args[0].double()
            best, chosen = (x @ gate.T.double()).topk(2)
            shares = torch.softmax(best / 1.5, -1)
            every = [alpha / rank * (x @ a.T.double()) @ b.double()
                     for alpha, a, b in zip(alphas, down.split(rank), up.T.split(rank), strict=True)]  # fmt: skip
            picked = torch.stack(every, -2).gather(-2, chosen[..., None].expand(*chosen.shape, y.shape[-1]))
            return y + (shares[..., None] * picked).sum(-2).to(y.dtype)

        layer.register_forward_hook(add)
    served.models["meteora"], served.paths["meteora"] = model, folder / "meteora"
    modules = sorted({name.rsplit(".", 2)[0] for name in tensors})
    config = {"peft_type": "METEORA", "r": rank, "n_adapters": 4, "target_modules": modules}
    beside = {"alphas": alphas, "top_k": 2, "temperature": 1.5}
    (folder / "meteora").mkdir()
    (folder / "meteora" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "meteora" / "flora_sidecar.json").write_text(json.dumps(beside))
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()},
              folder / "meteora" / "adapter_model.safetensors")  # fmt: skip


def write_mixlora(served: Served, folder: Path) -> None:
    """Experts in every feed-forward block, LoRA in the attention, and the model with their equation in it."""
    model = support.load(served.model)
    tensors = mixlora_support.random_tensors(model)
    mixlora_support.write(folder / "theirs", mixlora_support.config_of(act_fn="silu"), tensors)
    assert main(["convert", "--pickle", str(folder / "theirs"), str(folder / "mixlora")]) == 0
    served.models["mixlora"], served.paths["mixlora"] = mixlora_support.mixed_model(model, tensors), folder / "mixlora"


def save(model: Path, case: Case, path: Path, seed: int = 1) -> None:
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(support.load(model), case.config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            case.fill(name, parameter.data)
            parameter.data.mul_(next((by for key, by in SMALLER.items() if key in name or key == path.name), 1.0))
    wrapped.save_pretrained(str(path))


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.slow), "phi3", "gptbigcode"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp(request.param)
    served = Served(TINY_MODELS[request.param](folder / "model"))
    for name, case in cases_of(request.param).items():
        save(served.model, case, folder / name)
        served.paths[name] = folder / (name if case.task is None else f"{name}#{case.task}")
    if request.param == "llama":
        write_outside(served, folder)
        write_arrow(served, folder, "arrow", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
        write_meteora(served, folder)
        write_mixlora(served, folder)
    prompts = {name: support.prompt(5 + i % 17, seed=i) for i, name in enumerate(served.paths)}
    asks = [(name, Ask(PROMPT, path)) for name, path in served.paths.items()]
    asks += [(name, Ask(prompts[name], path)) for name, path in served.paths.items()]
    asks += [("base", Ask(PROMPT)), ("base", Ask(prompts[name]))]
    options = {"max_loras": len(served.paths), "max_lora_rank": 256, "max_flora_rank": 64, "max_num_seqs": 256}
    # vLLM's Transformers backend changes transformers' own classes, which the oracle needs as they are.
    options["own_process"] = request.param == "gptbigcode"
    with support.running(served.model, **options) as engine:
        for (name, ask), answer in zip(asks, engine.ask([ask for _, ask in asks], NEW), strict=True):
            served.answers.setdefault(name, []).append((ask, answer))
        for name, path in list(served.paths.items())[::7]:
            served.alone[name] = engine.ask([Ask(PROMPT, path)], NEW)[0]
        for path in served.paths.values():
            engine.llm.llm_engine.remove_lora(engine.request_for(path).lora_int_id)
        served.base_after = engine.ask([Ask(PROMPT)], NEW)[0]
    return served


def errors_of(served: Served) -> dict[str, float]:
    """Adapter -> largest difference of a logprob from PEFT's forward of its folder, over the whole answer."""
    worst: dict[str, float] = {}
    oracle = support.oracle_of(served.model)
    for name, state in served.states.items():
        worst[name] = max(oracle.error(state, ask, answer) for ask, answer in served.answers[name])
    for name, path in served.paths.items():
        if name in served.states:
            continue
        folder, _, task = str(path).partition("#")
        model = served.models.get(name)
        if model is None:
            model = peft.PeftModel.from_pretrained(support.load(served.model), folder).eval().base_model
        chosen = {"task_ids": torch.tensor([int(task)])} if task else {}
        for ask, answer in served.answers.get(name, ()):
            tokens = torch.tensor([[*ask.prompt, *answer.tokens]])
            with torch.no_grad():
                whole = torch.log_softmax(model(tokens, **chosen).logits[0].double(), -1)[len(ask.prompt) - 1 : -1]
            for place, row in zip(answer.logprobs, whole, strict=True):
                error = max(abs(value - float(row[token])) for token, value in place.items())
                worst[name] = max(worst.get(name, 0.0), error)
    return worst


def test_every_adapter_is_pefts_forward(served: Served, record_property: Any) -> None:
    worst = errors_of(served)
    assert set(worst) == set(served.paths)
    for name, error in worst.items():
        record_property(name, error)
    assert not {name: error for name, error in worst.items() if not error < TOLERANCE}


@pytest.mark.slow
def test_two_workers_serve_them_too_or_refuse_them_by_name(
    tmp_path_factory: pytest.TempPathFactory, record_property: Any
) -> None:
    """Each rank holds its part, or no rank holds any; the base's answers to a load are the whole module's."""
    folder = tmp_path_factory.mktemp("two")
    served = Served(TINY_MODELS["qwen2"](folder / "model"))
    for name, case in cases_of("qwen2").items():
        if case.task is None:
            save(served.model, case, folder / name)
            served.paths[name] = folder / name
    write_arrow(served, folder, "arrow", ["q_proj", "v_proj", "up_proj"])
    write_mixlora(served, folder)
    options = {"max_loras": len(served.paths), "max_lora_rank": 256, "max_flora_rank": 64, "max_num_seqs": 256}
    refused: dict[str, str] = {}
    with support.running(served.model, tensor_parallel_size=2, distributed_executor_backend="mp", **options) as engine:
        for name, path in served.paths.items():
            try:
                engine.llm.llm_engine.add_lora(engine.request_for(path))
            except Exception as error:  # the executor's own wrapper around a worker's AdapterError
                refused[name] = str(error)
        asks = [(name, Ask(PROMPT, path)) for name, path in served.paths.items() if name not in refused]
        for (name, ask), answer in zip(asks, engine.ask([ask for _, ask in asks], NEW), strict=True):
            served.answers.setdefault(name, []).append((ask, answer))
    for name, error in (worst := errors_of(served)).items():
        record_property(name, error)
    assert not {name: error for name, error in worst.items() if not error < TOLERANCE}
    assert not {name: message for name, message in refused.items() if "--tensor-parallel-size" not in message}
    assert set(refused) == REFUSED_BY_TWO


def test_every_row_of_the_table_is_served_here() -> None:
    """By an adapter of its kind in one of the batches above; what is left out says why."""
    known = {"FLORA", "MELORA", "XGBLORA", "MTLLORA"}  # test_engine_architectures, and `write_outside`
    known |= {"ARROW", "METEORA", "MIXLORA"}  # `write_arrow`, `write_meteora`, `write_mixlora`
    for architecture in ("llama", "qwen2", "phi3", "gptbigcode"):
        for case in cases_of(architecture).values():
            config = {key: getattr(value, "value", value) for key, value in case.config.to_dict().items()}
            config["peft_version"] = peft.__version__
            known.add(family_of(config)[0] or "")
    elsewhere = {
        "IA3", "HIRA",  # test_engine_architectures
        "QALORA",  # PEFT makes it on GPTQ layers alone; plain LoRA once read
        "LN_TUNING",  # test_engine_head
        "BONE",  # MiSS under its old names
    }  # fmt: skip
    assert {family.name for family in ROWS} <= known | elsewhere


def test_alone_is_as_in_the_batch(served: Served) -> None:
    for name, answer in served.alone.items():
        assert support.difference(answer, served.answers[name][0][1]) < TOLERANCE, name


def test_the_base_is_the_base_before_and_after(served: Served) -> None:
    oracle = support.oracle_of(served.model)
    assert served.base_after is not None
    for ask, answer in [*served.answers["base"], (Ask(PROMPT), served.base_after)]:
        assert oracle.error(None, ask, answer) < TOLERANCE


def test_embeddings_and_heads_saved_whole_are_the_adapters_whether_changed_or_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What PEFT writes beside an adapter with `modules_to_save` and `save_embedding_layers`."""
    folder = tmp_path_factory.mktemp("saved")
    model = TINY_MODELS["llama"](folder / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for name, change in (("equal", 0.0), ("changed", 0.1)):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(support.load(model), config)
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                fill_normal(key, parameter.data)
            elif "modules_to_save" in key:
                parameter.data[7] += change
        wrapped.save_pretrained(str(folder / name), save_embedding_layers=True)
    saved = load_file(folder / "equal" / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= set(saved)
    with support.running(model, max_loras=2) as engine:
        served = Served(model, {name: folder / name for name in ("equal", "changed")})
        asks = [Ask(PROMPT, path) for path in served.paths.values()]
        for name, ask, answer in zip(served.paths, asks, engine.ask(asks, NEW), strict=True):
            served.answers[name] = [(ask, answer)]
        layers = {adapter.id: set(adapter.layers) for adapter in engine.manager()._in_slots.values()}
    assert max(errors_of(served).values()) < TOLERANCE
    assert ["lm_head" in layers[number] for number in (1, 2)] == [False, True]
