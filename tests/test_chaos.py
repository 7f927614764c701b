"""What goes wrong around a server: full disks, folders that go, floods, clients that leave, killed processes.

One server for all but the last test, whose engine is killed in the end. Every answer is the one that the weights PEFT
merges give, or its request failed alone.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import httpx
import openai
import pytest
from engine_support import LOGPROB_TOLERANCE
from server_support import BASE, TINY_OPTIONS, Client, World, make_ask, make_world, under_load
from soak import ASKS, MOST_RUNNING, NEW_TOKENS, Soak, leave_stream, left_behind, resident_bytes, wait_until_idle

from flora_vllm.commands.server_process import ServerProcess
from flora_vllm.plugin.scratch import HANDED

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

ROOM_BYTES = 1 << 20
# --shutdown-timeout: time for workers to remove their files.
OPTIONS = (
    *TINY_OPTIONS, "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "8", "--shutdown-timeout", "5",
    "--max-num-seqs", str(MOST_RUNNING),
)  # fmt: skip
# How long the end may take after a death, with what is on the machine beside it.
END_S = 60.0


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The server's temporary directory, of a megabyte where we may mount one."""
    folder = tmp_path_factory.mktemp("scratch")
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@pytest.fixture(scope="module")
def server(world: World, scratch: Path) -> Iterator[ServerProcess]:
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1",
        # vLLM has torch compile what it needs for logprobs at their first use, with files in this directory.
        "TMPDIR": str(scratch), "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    with (
        mock.patch.dict(os.environ, environment),
        ServerProcess(world.model, {}, served_name=BASE, options=["--enable-lora", *OPTIONS], quiet=True) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Client:
    return Client(server.url, server.pid)


@pytest.fixture(scope="module")
def expected(world: World) -> dict[tuple[str, int], tuple[int, ...]]:
    soak = Soak(world, client=None, seed=0)  # pyright: ignore[reportArgumentType] - nobody is asked
    soak.expect()
    return soak.expected


@pytest.fixture
def right(client: Client, expected) -> Callable[[str, str], bool]:
    """Whether `model` answers as `adapter` does."""

    def right(model: str, adapter: str) -> bool:
        return client.ask(model, ASKS[0].prompt, new=NEW_TOKENS).tokens == expected[adapter, 0]

    return right


@pytest.fixture
def loaded(client: Client) -> Iterator[Callable[..., None]]:
    """Load an adapter, for this test."""
    names: set[str] = set()

    def load(name: str, path: Path, **more: bool) -> None:
        assert client.load(name, path, **more)[0] == 200
        names.add(name)

    yield load
    for name in names & client.names():
        assert client.unload(name)[0] == 200


def wait_until(holds: Callable[[], bool], seconds: float = END_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)


def log_of(server: ServerProcess) -> str:
    return server.log.read_text(errors="replace")


def test_a_full_disk_refuses_a_load_alone(client, server, world, scratch, loaded, right, tmp_path):
    if not os.path.ismount(scratch):
        pytest.skip("needs the right to mount a small file system")
    loaded("there", world.adapters["flora1"])
    filler = scratch / "filler"
    with under_load(client, World(world.model, {}, world.states | {"there": world.states["flora1"]}), [BASE, "there"]):
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass
        weights = world.adapters["lora"] / "adapter_model.safetensors"
        status, message = client.load("late", world.adapters["lora"])
        assert status == 400
        needed = sum(path.stat().st_size for path in weights.parent.iterdir() if path.name.startswith("adapter_"))
        assert f"{needed} bytes (No space left on device)" in message
        assert str(scratch) not in message, "the server's own places are its log's to tell"
        assert f"{needed} bytes, cannot be kept in {scratch}" in log_of(server)
        files = {
            "config": (weights.parent / "adapter_config.json").read_bytes(),
            # Large enough to be put in a file while it arrives.
            "weights": weights.read_bytes() + bytes(2 << 20),
        }
        for uploaded in (files, files | {"weights": weights.read_bytes()}):
            sent = {"lora_name": "sent"}
            answer = httpx.post(f"{client.url}/load_lora_adapter", data=sent, files=uploaded, timeout=60)
            assert answer.status_code == 400
            assert "No space left on device" in answer.text
        assert client.load("late", tmp_path / "nowhere")[0] == 404
        filler.unlink()
        loaded("late", world.adapters["lora"])
    assert right("late", "lora")
    assert client.names() == {BASE, "there", "late"}


def test_copies_of_what_was_unloaded_make_room(client, world, scratch, loaded, right):
    if not os.path.ismount(scratch):
        pytest.skip("needs the right to mount a small file system")
    size = sum(path.stat().st_size for path in world.adapters["lora"].iterdir())
    for number in range(2 * ROOM_BYTES // size):
        content = world.adapters["lora"]
        folder = shutil.copytree(content, scratch.parent / f"lora-{number}")
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().rstrip() + " " * (number + 1))  # another content
        assert client.load("one", folder)[0] == 200, number
        assert client.unload("one")[0] == 200
        shutil.rmtree(folder)
    loaded("last", world.adapters["flora2"])
    assert right("last", "flora2")


def test_folders_that_go(client, world, loaded, right, tmp_path):
    """While they are read, before the first use, after an eviction."""
    for round_number in range(12):
        folder = Path(shutil.copytree(world.adapters["flora5"], tmp_path / f"going-{round_number}"))
        name = f"going-{round_number}"
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(client.load, name, folder)
            time.sleep(0.004 * round_number)
            shutil.rmtree(folder)
        status, message = load.result()
        assert status in (200, 400, 404), message
        if status == 200:
            assert right(name, "flora5")
            assert client.unload(name)[0] == 200
        assert right(BASE, BASE)
    gone = Path(shutil.copytree(world.adapters["hira"], tmp_path / "gone"))
    loaded("gone", gone)
    shutil.rmtree(gone)
    for name in ("flora1", "lora"):  # two places
        loaded(name, world.adapters[name])
    assert right("gone", "hira")
    assert right("lora", "lora")


def test_floods_and_clients_that_leave(client, world, loaded, right, expected):
    names = ("flora1", "lora", "ia3")
    for name in names:
        loaded(name, world.adapters[name])
    rng = random.Random(0)

    def flood(count: int) -> None:
        with ThreadPoolExecutor(16) as pool:
            for _ in range(count):
                pool.submit(leave_stream, client.url, rng.choice([*names, BASE]), rng.choice((0, 1, 600)))

    flood(60)
    wait_until_idle(client)
    before = resident_bytes(client.pid)
    flood(240)
    impatient = openai.OpenAI(base_url=client.url, api_key="none", timeout=0.3, max_retries=0)
    asks = [(rng.choice([*names, BASE]), rng.randrange(len(ASKS))) for _ in range(8 * MOST_RUNNING)]

    def ask(one: tuple[str, int]) -> bool:
        """Right, or too late."""
        try:
            found = impatient.completions.create(
                model=one[0], prompt=list(ASKS[one[1]].prompt), max_tokens=NEW_TOKENS, temperature=0, logprobs=1,
                extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
            )  # fmt: skip
        except openai.APITimeoutError:
            return True
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        tokens = tuple(int(token.removeprefix("token_id:")) for token in logprobs.tokens or ())
        return tokens == expected[one]

    with ThreadPoolExecutor(len(asks)) as pool:
        assert all(pool.map(ask, asks))
    wait_until_idle(client)
    assert resident_bytes(client.pid) - before < max(0.05 * before, 32 << 20)
    for name in (*names, BASE):
        assert right(name, name)


def test_sleep_and_pause_while_an_adapter_loads(client, world, loaded, right, tmp_path):
    """A CPU does not sleep, but its engine stops: what comes meanwhile waits and is answered."""
    root = client.url.removesuffix("/v1")
    loaded("before", world.adapters["flora2"])
    paused = ("sleep?level=0&mode=keep", "wake_up?tags=scheduling")
    for halt, go_on in (("sleep?level=1", "wake_up"), ("sleep?level=2", "wake_up"), paused):
        assert httpx.post(f"{root}/{halt}", timeout=60).status_code == 200, halt
        name = "".join(filter(str.isalnum, halt))
        with ThreadPoolExecutor(2) as pool:
            load = pool.submit(client.load, name, world.adapters["hira"])
            ask = pool.submit(right, "before", "flora2")
            time.sleep(1)
            assert not ask.done()
            assert httpx.post(f"{root}/{go_on}", timeout=60).status_code == 200, go_on
            assert load.result(60)[0] == 200
            assert ask.result(60)
        assert right(name, "hira")
        assert client.unload(name)[0] == 200


def test_unloaded_while_its_requests_run_and_wait(client, world, loaded, right, expected):
    loaded("many", world.adapters["ia3"])
    # In the order in which no request is counted twice.
    asked = ("vllm:request_success_total", "vllm:num_requests_running", "vllm:num_requests_waiting")
    before, count = sum(map(client.metric, asked)), 16 * MOST_RUNNING
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(client.ask, "many", ASKS[0].prompt, 400) for _ in range(count)]
        # All have arrived: of so many new connections some come late.
        wait_until(lambda: sum(map(client.metric, asked)) >= before + count)
        assert client.unload("many")[0] == 200
        with pytest.raises(openai.NotFoundError):
            client.ask("many", ASKS[0].prompt)
        answers = [one.result(120) for one in running]
    assert {answer.tokens[:NEW_TOKENS] for answer in answers} == {expected["ia3", 0]}
    assert right(BASE, BASE)
    wait_until(lambda: client.metric("vllm:num_cpu_loaded_lora_adapters") == 0)


def test_one_name_replaced_200_times(client, world, expected):
    """Every answer is the one of a version that the name had between question and answer."""
    soak = Soak(world, client, seed=0)
    soak.expected = expected
    name = next(iter(soak.history))
    askers = [threading.Thread(target=soak.ask, args=(seed, [name])) for seed in range(3)]
    assert client.load(name, world.adapters["lora"])[0] == 200
    soak._note(name, "lora", only=True)
    for thread in askers:
        thread.start()
    try:
        for turn in range(200):
            wanted = ("flora1", "ia3", "hira", "lora")[turn % 4]
            soak._note(name, wanted)
            status, message = client.load(name, world.adapters[wanted], load_inplace=True)
            assert status == 200, message
            soak._note(name, wanted, only=True)
    finally:
        soak.stop.set()
        for thread in askers:
            thread.join(120)
    assert soak.faults == []
    assert soak.answers > 20
    assert client.unload(name)[0] == 200


def processes(below: int) -> dict[int, str]:
    """Process id -> command of a process and all below it."""
    found, waiting = {}, [below]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError):
            found[process] = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].decode()
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return found


def kill(below: int, name: str) -> set[int]:
    """Kill the first process of that name; the ids of all that were there."""
    there = processes(below)
    os.kill(next(process for process, command in there.items() if command.startswith(name)), signal.SIGKILL)
    return {*there}


def test_a_killed_engine_ends_its_server(client, server, world, scratch):
    assert client.load("kept", world.adapters["lora"])[0] == 200
    assert left_behind(scratch)
    there = kill(server.pid, "VLLM::EngineCore")
    assert server.wait(END_S) == 1
    wait_until(lambda: not any(map(is_running, there)))
    assert "the engine died" in log_of(server)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_killed_worker_brings_its_server_back(world: World, tmp_path: Path) -> None:
    """Two ranks, `flora-vllm serve --restart`: the same adapters, those loaded by request, uploads and mixes too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch, log = tmp_path / "scratch", tmp_path / "log"
    scratch.mkdir()
    command = [sys.executable, "-m", "flora_vllm.commands.cli", "serve", "--restart", str(world.model)]
    command += ["--port", str(port), "--served-model-name", BASE, "--enforce-eager", *OPTIONS]
    command += ["--tensor-parallel-size", "2", "--lora-modules", f"told={world.adapters['lora']}"]
    environment = {
        **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)
    }  # fmt: skip
    client, ask, oracle = Client(f"http://127.0.0.1:{port}/v1"), make_ask(5), world.oracle()

    def serves() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        assert supervisor.poll() is None, log.read_text()[-3000:]
        return False

    with log.open("wb") as file:
        supervisor = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        wait_until(serves, 600)
        assert client.load("asked", world.adapters["flora5"])[0] == 200
        mix = {"lora_name": "mixed", "mix": {"told": 0.5, "asked": 0.5}}
        assert client.post("load_lora_adapter", mix)[0] == 200
        files = {
            "config": (world.adapters["hira"] / "adapter_config.json").read_bytes(),
            "weights": (world.adapters["hira"] / "adapter_model.safetensors").read_bytes(),
        }
        sent = {"lora_name": "sent"}
        assert httpx.post(f"{client.url}/load_lora_adapter", data=sent, files=files, timeout=60).status_code == 200
        before = {name: client.ask(name, ask.prompt) for name in ("told", "asked", "sent", "mixed", BASE)}
        broken = shutil.copytree(world.adapters["ia3"], tmp_path / "broken")
        assert client.load("broken", broken)[0] == 200
        (broken / "adapter_config.json").write_text("{}")
        time.sleep(5)  # the list of adapters is looked at every two seconds
        folders = left_behind(scratch)
        there = kill(supervisor.pid, "VLLM::Worker")
        wait_until(lambda: not any(map(is_running, there - {supervisor.pid})))
        said = log.read_text(errors="replace")
        assert "died unexpectedly" in said
        assert "the engine died" in said
        wait_until(serves, 600)
        said = log.read_text(errors="replace")
        assert "the server ended with status 1; again in" in said
        assert "adapter 'broken' cannot be loaded again" in said
        assert client.names() == {BASE, "told", "asked", "sent", "mixed"}
        for name, answer in before.items():
            assert client.ask(name, ask.prompt).tokens == answer.tokens
        assert oracle.error(world.states["flora5"], ask, client.ask("asked", ask.prompt)) < LOGPROB_TOLERANCE
        kept = [path.name for path in scratch.glob(f"{HANDED}*")]
        assert {*folders} & {*left_behind(scratch)} == {*kept}, "no more of the server that was killed"
        assert len(kept) == 1
    finally:
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(END_S) == 130
    assert left_behind(scratch) == []
