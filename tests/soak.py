"""Random loads, reloads and unloads under traffic whose every answer is checked; memory and files are watched.

    make soak                          # an hour
    python tests/soak.py --minutes 5

One operator thread loads, replaces and unloads adapters of all families under a few names; the others ask for these
names all the time, more of them than the engine runs at once, and one goes away in the middle of each answer. An answer
must be the one of a version that was current at some time between its request and its arrival, told from the weights
that PEFT merges; "not found" counts only if the name was away for a moment of it.
"""

import argparse
import json
import math
import random
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import openai
from server_support import BASE, Client, World, make_ask, make_world, serving

NAMES = [f"team/n{i}" for i in range(6)]
ASKS = [make_ask(seed) for seed in range(3)]
NEW_TOKENS = 6
# What the engine runs at a time, and who asks: more than twice as many.
MOST_RUNNING, ASKERS = 4, 9
SERVER_OPTIONS = (
    "--max-loras", "3", "--max-cpu-loras", "4", "--max-lora-rank", "8", "--max-num-seqs", str(MOST_RUNNING),
    "--shutdown-timeout", "5",  # time for workers to remove their files: vLLM's server kills them otherwise
)  # fmt: skip
# Of memory, from the end of the first fifth on; and how much of it is noise for a short run.
MOST_GROWTH, NOISE_BYTES = 0.05, 64 << 20


@dataclass
class Soak:
    """What happened. `history`: name -> (time, adapter or None) of each change, before and after it was made."""

    world: World
    client: Client
    seed: int
    history: dict[str, list[tuple[float, str | None]]] = field(
        default_factory=lambda: {name: [(-math.inf, None)] for name in NAMES}
    )
    answers: int = 0
    missing: int = 0
    changes: int = 0
    left: int = 0
    faults: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    expected: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)

    def expect(self) -> None:
        """The tokens that each adapter gives to each ask, by its merged weights."""
        oracle = self.world.oracle()
        self.expected = {
            (name, i): tuple(oracle.greedy(state, ask.prompt, NEW_TOKENS))
            for name, state in self.world.states.items()
            for i, ask in enumerate(ASKS)
        }

    def operate(self) -> None:
        """Load, replace or unload one name after another until told to stop."""
        rng = random.Random(self.seed)
        loaded: dict[str, str | None] = dict.fromkeys(NAMES)
        while not self.stop.is_set():
            name = rng.choice(NAMES)
            now = loaded[name]
            wanted = None if now is not None and rng.random() < 0.3 else rng.choice(sorted(self.world.adapters))
            self._note(name, wanted)  # from now on both may answer
            if wanted is None:
                status, text = self.client.unload(name)
            else:
                status, text = self.client.load(name, self.world.adapters[wanted], load_inplace=now is not None)
            if status != 200:
                self._fault(f"{name}: {now} -> {wanted}: {status} {text}")
            loaded[name] = wanted
            self._note(name, wanted, only=True)
            self.changes += 1

    def ask(self, seed: int, names: Sequence[str] = (*NAMES, BASE)) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            name, i = rng.choice(names), rng.randrange(len(ASKS))
            begin = time.monotonic()
            try:
                answer = self.client.ask(name, ASKS[i].prompt, new=NEW_TOKENS).tokens
            except openai.NotFoundError:
                answer = None
            except openai.OpenAIError as error:
                self._fault(f"{name}: {error}")
                continue
            self._check(name, i, answer, begin, time.monotonic())

    def leave(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.wait(0.1):
            try:
                leave_stream(self.client.url, rng.choice([*NAMES, BASE]), rng.choice((0, 1, 600)))
                self.left += 1
            except OSError as error:
                self._fault(f"no stream to leave: {error!r}")

    def _check(self, name: str, i: int, answer: tuple[int, ...] | None, begin: float, end: float) -> None:
        versions = {BASE} if name == BASE else self._versions(name, begin, end)
        allowed = {None if version is None else self.expected[version, i] for version in versions}
        with self.lock:
            self.answers += answer is not None
            self.missing += answer is None
        if answer not in allowed:
            self._fault(f"{name}: an answer of none of {versions}: {answer}")

    def _versions(self, name: str, begin: float, end: float) -> set[str | None]:
        """What the name may have meant between the two times."""
        with self.lock:
            notes = list(self.history[name])
        before = [adapter for at, adapter in notes if at <= begin][-2:]
        return {*before, *(adapter for at, adapter in notes if begin < at <= end)}

    def _note(self, name: str, adapter: str | None, *, only: bool = False) -> None:
        """`adapter` may answer from now on; `only` it."""
        with self.lock:
            now = time.monotonic()
            self.history[name] += [(now, adapter)] * (2 if only else 1)

    def _fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text[:500])
        self.stop.set()

    def run(self, seconds: float, pid: int) -> float:
        """The growth of the server's memory, as a fraction. Raises AssertionError for any fault."""
        work = [threading.Thread(target=self.operate), threading.Thread(target=self.leave, args=(ASKERS,))]
        work += [threading.Thread(target=self.ask, args=(i,)) for i in range(ASKERS)]
        for thread in work:
            thread.start()
        try:
            self.stop.wait(seconds / 5)
            early = resident_bytes(pid)
            self.stop.wait(seconds * 4 / 5)
            late = resident_bytes(pid)
        finally:
            self.stop.set()
            for thread in work:
                thread.join(300)
        assert not self.faults, self.faults[:3]
        wait_until_idle(self.client)
        assert late - early < max(MOST_GROWTH * early, NOISE_BYTES), f"memory grew from {early} to {late} bytes"
        return late / early - 1


def leave_stream(url: str, model: str, after_bytes: int) -> None:
    """Ask for a long stream and go away when that much of it has come."""
    address = urllib.parse.urlsplit(url)
    body = {"model": model, "prompt": ASKS[0].prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
    content = json.dumps(body)
    head = f"Host: {address.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        connection.sendall(f"POST {address.path}/completions HTTP/1.1\r\n{head}\r\n\r\n{content}".encode())
        if after_bytes:
            connection.recv(after_bytes)


def wait_until_idle(client: Client, seconds: float = 60) -> None:
    """Until nothing runs, waits or holds blocks: of requests that nobody waits for, too. Raises AssertionError."""
    end, busy = time.monotonic() + seconds, {"a metric": 1.0}
    while any(busy.values()):
        assert time.monotonic() < end, f"not idle after {seconds:.0f} s: {busy}"
        client.ask(BASE, ASKS[0].prompt, new=1)  # gauges are as old as the last step
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        busy = {name: client.metric(name) for name in names}
        time.sleep(0.1)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all below it, shared pages counted once each."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
    return total


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("flora-"))


def main() -> None:
    from tiny_models import TINY_MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text, tempfile.TemporaryDirectory() as scratch:
        model = TINY_MODELS["llama"](Path(text) / "model")
        world = make_world(model, Path(text) / "adapters")
        with serving(model, {}, *SERVER_OPTIONS, environment={"TMPDIR": scratch}) as client:
            soak = Soak(world, client, options.seed)
            soak.expect()
            growth = soak.run(60 * options.minutes, client.pid)
        assert not left_behind(Path(scratch)), left_behind(Path(scratch))
    counts = f"{soak.answers} answers, {soak.missing} not found, {soak.left} left, {soak.changes} changes"
    print(f"{counts}, memory {growth:+.2%}", file=sys.stderr)


if __name__ == "__main__":
    main()
