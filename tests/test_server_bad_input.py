"""Adapters that cannot be served: one message with every fault, nothing half-loaded, everybody else undisturbed."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from server_support import BASE, Client, World, make_ask, make_world, serving, under_load

from flora_vllm.errors import FloraError
from flora_vllm.formats import write_flora

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.flora_A.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World, root: Path) -> Iterator[Client]:
    kept = {name: world.adapters[name] for name in ("flora1", "lora")}
    options = ("--max-loras", "4", "--max-flora-rank", "8", "--flora-adapter-root", str(root))
    with serving(world.model, kept, *options) as client:
        yield client


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def corrupt(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def several(folder: Path) -> None:
    edit_config(folder, alpha=3, r=0)
    edit_weights(folder, lambda t: t[Q0].fill_(float("nan")))


def other_model(folder: Path) -> None:
    shutil.rmtree(folder)
    write_flora(folder, {"model.layers.7.self_attn.q_proj": (torch.ones(1, 128), torch.ones(128, 1))})


def other_width(folder: Path) -> None:
    shutil.rmtree(folder)
    write_flora(folder, {"model.layers.0.self_attn.q_proj": (torch.ones(1, 96), torch.ones(128, 1))})


def high_rank(folder: Path) -> None:
    shutil.rmtree(folder)
    write_flora(folder, {"model.layers.0.self_attn.q_proj": (torch.ones(9, 128), torch.ones(128, 9))})


def embeddings(folder: Path) -> None:
    edit_config(folder, target_modules=["embed_tokens"], r=1)
    name = "base_model.model.model.embed_tokens.flora"
    save_file({f"{name}_A.weight": torch.ones(1, 128), f"{name}_B.weight": torch.ones(512, 1)}, folder / WEIGHTS)


# What is done to a good FLoRA adapter, and what the one message must name.
FAULTS: list[tuple[Callable[[Path], object], list[str]]] = [
    (truncate, [WEIGHTS]),
    (corrupt, [WEIGHTS]),
    (empty, ["empty"]),
    (only_pickle, ["adapter_model.bin", "pickle"]),
    (lambda f: edit_weights(f, lambda t: t.pop(Q0)), [Q0, "missing"]),
    (lambda f: edit_weights(f, lambda t: t.update({Q0: t[Q0][:, :-1].contiguous()})), [Q0, "127", "128"]),
    (lambda f: edit_weights(f, lambda t: t.update({Q0: t[Q0].to(torch.int8)})), [Q0, "I8"]),
    (lambda f: edit_weights(f, lambda t: t[Q0][0, 3:5].fill_(float("inf"))), [Q0, "2 NaN or Inf"]),
    (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.x.bias": torch.ones(3)})),
        ["base_model.model.x.bias"],
    ),
    (lambda f: edit_config(f, lora_alpha=16), ["lora_alpha"]),
    (lambda f: edit_config(f, reduction="median"), ["reduction", "median", "mean"]),
    (lambda f: edit_config(f, peft_type="BOFT"), ["family BOFT", "not understood"]),
    (lambda f: edit_config(f, peft_type="LILY"), ["LILY", "supported"]),
    (lambda f: (f / CONFIG).write_text("{"), [CONFIG]),
    (other_model, ["model.layers.7.self_attn.q_proj", "base model"]),
    (other_width, ["96", "128"]),
    (high_rank, ["rank 9", "limit 8"]),
    (embeddings, ["embed_tokens"]),
    (several, ["alpha", "'r'", Q0, "NaN"]),
]


@pytest.fixture
def faulty(world: World, root: Path) -> Iterator[Path]:
    folder = root / "faulty"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.adapters["flora2"], folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_every_fault_is_named_under_load(client: Client, world: World, root: Path) -> None:
    with under_load(client, world, [BASE, "flora1", "lora"]):
        for break_it, words in FAULTS:
            folder = root / "faulty"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(world.adapters["flora2"], folder)
            break_it(folder)
            status, message = client.load("faulty", folder)
            assert status == 400, (words, status, message)
            assert [word for word in words if word not in message] == [], message
            assert client.names() == {BASE, "flora1", "lora"}, "nothing of it may be left"
    with pytest.raises(openai.NotFoundError):
        client.ask("faulty", make_ask(1).prompt)


def test_paths_out_of_the_root(client: Client, world: World, root: Path, faulty: Path) -> None:
    (root / "link").symlink_to(world.adapters["flora2"])
    (faulty / WEIGHTS).unlink()
    (faulty / WEIGHTS).symlink_to(world.adapters["flora2"] / WEIGHTS)
    outside = world.adapters["flora2"]
    for path in (outside, root / ".." / outside.parent.name / "flora2", root / "link", faulty, "../flora2", root):
        status, message = client.load("escaped", path)
        assert (status, "escaped" in client.names()) == (400, False), message


def test_paths_that_are_no_directory(client: Client, root: Path) -> None:
    (root / "file").write_text("x")
    for path in (root / "nothing", root / "file"):
        status, message = client.load("nothing", path)
        assert 400 <= status < 500
        assert "cannot be served" in message


def test_bad_names(client: Client, root: Path, faulty: Path) -> None:
    assert client.load(BASE, faulty)[0] == 400
    assert client.load("", faulty)[0] == 400
    assert client.load("flora1", faulty)[0] == 400
    assert client.unload("nobody")[0] == 404


def test_a_directory_that_changes_while_it_loads(client: Client, world: World, faulty: Path) -> None:
    """Each load gets one version as a whole, or is refused; the engine lives."""
    versions = [(world.adapters[name] / WEIGHTS).read_bytes() for name in ("flora1", "flora2")]
    configs = [(world.adapters[name] / CONFIG).read_bytes() for name in ("flora1", "flora2")]
    stop = threading.Event()

    def rewrite() -> None:
        turn = 0
        while not stop.is_set():
            turn = 1 - turn
            (faulty / WEIGHTS).write_bytes(versions[turn])
            (faulty / CONFIG).write_bytes(configs[turn])

    thread = threading.Thread(target=rewrite)
    thread.start()
    oracle, ask, outcomes = world.oracle(), make_ask(3), []
    try:
        for _ in range(25):
            status, message = client.load("moving", faulty, load_inplace=True)
            assert status in (200, 400), message
            outcomes.append(status)
            if status == 200:
                answer = client.ask("moving", ask.prompt)
                assert answer.tokens in [
                    oracle.greedy(world.states[name], ask.prompt, 8) for name in ("flora1", "flora2")
                ]
    finally:
        stop.set()
        thread.join()
    client.unload("moving")
    assert 400 in outcomes, "the writer never got in the way: the test shows nothing"


def test_a_bad_adapter_on_the_command_line_stops_the_start(world: World, faulty: Path) -> None:
    several(faulty)
    with pytest.raises(FloraError) as stopped, serving(world.model, {"bad": faulty}):
        pass
    assert "cannot be served" in str(stopped.value)
    assert Q0 in str(stopped.value)


def test_an_unreadable_file_is_refused(client: Client, faulty: Path) -> None:
    (faulty / WEIGHTS).unlink()
    os.mkfifo(faulty / WEIGHTS)
    status, message = client.load("fifo", faulty)
    assert status == 400
    assert "regular file" in message


def test_plain_vllm_refuses_a_flora_directory(world: World, tmp_path: Path) -> None:
    """Whatever goes wrong with the plugin, stock vLLM must not take FLoRA for LoRA."""
    from vllm.lora.peft_helper import PEFTHelper

    with pytest.raises(ValueError, match="lora_alpha"):
        PEFTHelper.from_local_dir(str(world.adapters["flora1"]), 512)
