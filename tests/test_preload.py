"""An engine's adapters are known by their content: reloads, names and ids, offline and on the asynchronous engine."""

import asyncio
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_support as support
import pytest
from engine_support import Answer, Ask, Engine

import flora_vllm
from flora_vllm.plugin import handed, preload
from flora_vllm.plugin.identity import split_identity

pytestmark = support.ENGINE_MARKS

PROMPT = support.prompt(150, seed=4)  # more than one block of the prefix cache


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return support.write_every_family(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(tiny_model) -> Iterator[Engine]:
    with support.running(tiny_model("llama"), max_loras=2, max_cpu_loras=4) as engine:
        yield engine


def _request(name: str, number: int, path: Path, *, load_inplace: bool = False) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path), load_inplace=load_inplace)


def _publish(source: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)


def _ask(engine: Engine, request: Any) -> tuple[Answer, Any]:
    """The answer to PROMPT, and vLLM's output."""
    import vllm

    sampling = vllm.SamplingParams(temperature=0, max_tokens=6, logprobs=5, detokenize=False, ignore_eos=True)
    output = engine.llm.generate([{"prompt_token_ids": list(PROMPT)}], sampling, lora_request=request, use_tqdm=False)
    return support._answer(output[0].outputs[0]), output[0]


def test_generate_with_load_inplace_serves_what_is_there_now(engine, adapters, tmp_path):
    wanted = {name: engine.ask([Ask(PROMPT, adapters[name])], tokens=6)[0] for name in ("flora-2", "lora")}
    for turn, name in enumerate(("flora-2", "lora", "lora", "flora-2")):
        _publish(adapters[name], tmp_path / "mine")
        answer, output = _ask(engine, _request("mine", 71, tmp_path / "mine", load_inplace=True))
        assert support.difference(answer, wanted[name]) < support.LOGPROB_TOLERANCE, turn
        assert output.lora_request.lora_name == "mine"
        # The prompt's first block of this content has been computed before, but for the first time of each.
        assert (output.num_cached_tokens > 0) == (turn > 1)
    _publish(adapters["lora"], tmp_path / "mine")
    answer, _ = _ask(engine, _request("mine", 71, tmp_path / "mine"))
    assert support.difference(answer, wanted["flora-2"]) < support.LOGPROB_TOLERANCE, "nobody asked for a reload"


def test_removed_and_loaded_again_is_what_is_there_now(engine, adapters, tmp_path):
    request = _request("mine", 72, tmp_path / "mine")
    for name in ("flora-1", "ia3"):
        wanted = engine.ask([Ask(PROMPT, adapters[name])], tokens=6)[0]
        _publish(adapters[name], tmp_path / "mine")
        engine.llm.llm_engine.add_lora(request)
        assert support.difference(_ask(engine, request)[0], wanted) < support.LOGPROB_TOLERANCE
        engine.llm.llm_engine.remove_lora(72)


def test_a_name_that_looks_like_an_identity_is_a_name(engine, adapters):
    name = "poems@" + "0123456789abcdef" * 4
    answer, output = _ask(engine, _request(name, 73, adapters["hira"]))
    wanted = engine.ask([Ask(PROMPT, adapters["hira"])], tokens=6)[0]
    assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE
    assert output.lora_request.lora_name == name


def test_one_id_for_two_names_is_refused(engine, adapters):
    _ask(engine, _request("one", 74, adapters["ia3"]))
    with pytest.raises(flora_vllm.AdapterError, match=r"'other' cannot be served.*\n.* id 74 is adapter 'one'"):
        _ask(engine, _request("other", 74, adapters["lora"]))


def test_what_cannot_be_had_from_the_hub_is_refused_by_name(engine):
    with pytest.raises(flora_vllm.AdapterError, match="'nobody/nothing' cannot be served"):
        _ask(engine, _request("absent", 75, Path("nobody/nothing")))


def _handed(name: str, number: int, source: Path, **changes: Any) -> Any:
    """A request as trainers make them: a subclass of vLLM's with the tensors on it, and a path that means nothing."""
    import msgspec
    from safetensors.torch import load_file
    from vllm.lora.request import LoRARequest

    class TensorLoRARequest(LoRARequest):
        peft_config: Any = msgspec.field(default=None)
        lora_tensors: Any = msgspec.field(default=None)

    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"] = set(config["target_modules"])
    return TensorLoRARequest(
        name, number, "no_such_path", peft_config=config | changes,
        lora_tensors=load_file(source / "adapter_model.safetensors"), load_inplace=True,
    )  # fmt: skip


def test_tensors_on_a_request_are_served_and_replaced(engine, adapters):
    for name in ("lora", "flora-4", "lora"):
        wanted = engine.ask([Ask(PROMPT, adapters[name])], tokens=6)[0]
        answer, output = _ask(engine, _handed("live", 76, adapters[name]))
        assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE
        assert output.lora_request.lora_name == "live"
    with pytest.raises(flora_vllm.AdapterError, match=r"'live' .*\n.*no_such_key"):
        _ask(engine, _handed("live", 76, adapters["lora"], no_such_key=3))
    assert support.difference(_ask(engine, _request("live", 76, Path("no_such_path")))[0], answer) < 1e-4
    assert not [path for path in handed._root().iterdir() if path.is_dir()]


class _AsyncEngine:
    """Keeps what it is told, as vLLM's asynchronous engine would pass it on."""

    def __init__(self, additional_config: Any) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)
        self.loaded: list[tuple[str, bool]] = []
        self.added: list[Any] = []

    async def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any = None) -> None:
        self.added.append(lora_request or prompt.lora_request)

    async def add_lora(self, lora_request: Any) -> bool:
        self.loaded.append((lora_request.lora_name, lora_request.load_inplace))
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return True


def test_the_asynchronous_engine_hears_of_contents(adapters, tmp_path):
    wrapped = type("Wrapped", (_AsyncEngine,), {})
    preload._wrap_async(wrapped)
    engine: Any = wrapped({"flora": {}})

    async def run() -> None:
        for name, inplace in (("lora", False), ("ia3", False), ("ia3", True), ("ia3", True)):
            _publish(adapters[name], tmp_path / "mine")
            request = _request("mine", 5, tmp_path / "mine", load_inplace=inplace)
            await engine.add_request("r", "prompt", None, lora_request=request)
        made = SimpleNamespace(lora_request=request)
        await engine.add_request("r", made, None)
        await engine.remove_lora(5)
        await engine.add_request("r", made, None)

    asyncio.run(run())
    names = [request.lora_name for request in engine.added]
    assert {split_identity(name)[0] for name in names} == {"mine"}
    assert names[0] == names[1] != names[2] == names[3] == names[4] == names[5]
    # Only the first load of other content replaces anything.
    assert engine.loaded == [(names[0], False), (names[2], True), *[(names[2], False)] * 3]


@pytest.mark.parametrize("config", [None, {}, "no config"])
def test_engines_without_flora_and_stand_ins_pass_through(config, adapters):
    wrapped = type("Wrapped", (_AsyncEngine,), {})
    preload._wrap_async(wrapped)
    engine: Any = wrapped(config)
    if config == "no config":
        del engine.vllm_config
    request = _request("mine", 5, adapters["lora"], load_inplace=True)
    asyncio.run(engine.add_request("r", "prompt", None, lora_request=request))
    asyncio.run(engine.add_lora(request))
    assert engine.added[0] is request
    assert engine.loaded == [("mine", True)]
