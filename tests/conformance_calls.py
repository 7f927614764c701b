"""What a client of vLLM's LoRA server may do, as one sequence of calls that stock vLLM and ours are both put through.

The cases follow vLLM's own server tests (tests/entrypoints/serve/lora and sagemaker) and AIBrix's checks of an engine
with adapters: load, list, use, load again, invalid names and paths, faulty files, unload, use what is gone. What a
case must come to is nowhere written down but in the phrases that clients match: stock's answer is the yardstick.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save_file
from server_support import BASE

RANK = 8  # of the adapters
PROMPT = "the quick brown fox"


@dataclass(frozen=True)
class Reply:
    """An HTTP answer: status, vLLM's error type and message (the text where there is none), and what it says."""

    status: int
    kind: str | None
    message: str
    body: Any

    @classmethod
    def of(cls, response: httpx.Response) -> "Reply":
        try:
            body = response.json()
        except ValueError:
            return cls(response.status_code, None, response.text, None)
        error = body.get("error") if isinstance(body, dict) else None
        if isinstance(error, dict):
            return cls(response.status_code, error.get("type"), str(error.get("message")), body)
        return cls(response.status_code, None, response.text, body)


class Session:
    """One server, and the adapters' directories that both servers are given."""

    def __init__(self, url: str, folder: Path) -> None:
        self.root, self.folder = url.removesuffix("/v1"), folder
        self._http = httpx.Client(base_url=self.root, timeout=120)

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, **more: Any) -> Reply:
        return Reply.of(self._http.request(method, path, **more))

    def post(self, path: str, **body: Any) -> Reply:
        return self.send("POST", path, json=body)

    def load(self, name: str, path: str, **more: Any) -> Reply:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(self.folder / path), **more)

    def try_out(self, name: str, path: str) -> Reply:
        """The answer to a load that leaves nothing behind."""
        reply = self.load(name, path)
        self.unload(name)
        return reply

    def unload(self, name: str, **more: Any) -> Reply:
        return self.post("/v1/unload_lora_adapter", lora_name=name, **more)

    def complete(self, model: str, **more: Any) -> Reply:
        return self.post("/v1/completions", model=model, prompt=PROMPT, **{"max_tokens": 4, "temperature": 0, **more})

    def chat(self, model: str, **more: Any) -> Reply:
        messages = [{"role": "user", "content": PROMPT}]
        return self.post("/v1/chat/completions", model=model, messages=messages, max_tokens=4, temperature=0, **more)

    def models(self) -> Reply:
        return self.send("GET", "/v1/models")


@dataclass(frozen=True)
class Case:
    """`call` and, where clients match words, the phrase that both messages must have."""

    name: str
    call: Callable[[Session], Reply]
    phrase: str = ""


def _named(name: str) -> Case:
    return Case(f"name {name[:12]!r} of {len(name)}", lambda s: s.try_out(name, "lora"), f"LoRA adapter '{name}' added")


def _faulty(folder: str, phrase: str = "") -> Case:
    return Case(f"load {folder}", lambda s: s.try_out(folder, folder), phrase)


def _at_once(session: Session, calls: Sequence[Callable[[], Reply]]) -> Reply:
    """One reply for calls made at the same time: their statuses, sorted."""
    with ThreadPoolExecutor(len(calls)) as pool:
        statuses = sorted(reply.status for reply in pool.map(lambda call: call(), calls))
    return Reply(statuses[0], None, str(statuses), statuses)


def _many(session: Session) -> Reply:
    """More adapters than are kept in memory, each used after all were loaded; then all unloaded."""
    names = [f"many{i}" for i in range(6)]
    replies = [session.load(name, "lora") for name in names]
    replies += [session.complete(name) for name in names for _ in range(2)]
    replies += [session.unload(name) for name in names]
    return Reply(max(r.status for r in replies), None, "", None)


def _faults_do_not_hurt_others(session: Session) -> Reply:
    """vLLM's test_loading_invalid_adapters_does_not_break_others."""
    calls = [lambda: session.complete("lora"), lambda: session.load("x", "broken-json")] * 6
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda call: call(), calls))
    return Reply(max(reply.status for reply in replies[::2]), None, "", None)


def _adapter_of_invocation(session: Session) -> Reply:
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "sage"}
    return session.send("POST", "/invocations", headers=headers, json={"prompt": PROMPT, "max_tokens": 4})


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# In this order, on one server.
CASES: tuple[Case, ...] = (
    Case("list at start", Session.models),
    Case("the adapter of the command line", lambda s: s.complete("lora")),
    Case("load", lambda s: s.load("new", "lora"), "Success: LoRA adapter 'new' added successfully."),
    Case("list with the new one", Session.models),
    Case("completion", lambda s: s.complete("new", logprobs=3)),
    Case("completion of the base", lambda s: s.complete(BASE, logprobs=3)),
    Case("several choices", lambda s: s.complete("new", n=2, temperature=1, seed=1)),
    Case("echo with logprobs", lambda s: s.complete("new", echo=True, logprobs=1)),
    Case("beam search", lambda s: s.complete("new", use_beam_search=True, n=2)),
    Case("chat", lambda s: s.chat("new", logprobs=True)),
    Case("responses", lambda s: s.post("/v1/responses", model="new", input=PROMPT, max_output_tokens=4)),
    Case("tokenize", lambda s: s.post("/tokenize", model="new", prompt=PROMPT)),
    Case("embeddings of a generating model", lambda s: s.post("/v1/embeddings", model="new", input=PROMPT)),
    Case("load again", lambda s: s.load("new", "lora"), "The lora adapter 'new' has already been loaded."),
    Case("load in place, same files", lambda s: s.load("new", "lora", load_inplace=True), "'new' added successfully"),
    Case("load in place, other files", lambda s: s.load("new", "other", load_inplace=True), "added successfully"),
    Case("list after the reload", Session.models),
    Case("completion after the reload", lambda s: s.complete("new", logprobs=3)),
    Case("load in place of nothing", lambda s: s.load("first", "lora", load_inplace=True), "added successfully"),
    Case("load the command line's", lambda s: s.load("lora", "lora"), "has already been loaded"),
    Case("the experts' layout said", lambda s: s.load("flat", "lora", is_3d_lora_weight=False), "added"),
    Case("no name", lambda s: s.load("", "lora"), "Both 'lora_name' and 'lora_path' must be provided."),
    Case("no path", lambda s: s.post(LOAD, lora_name="x", lora_path=""), "Both 'lora_name' and 'lora_path' must be"),
    Case("name left out", lambda s: s.post(LOAD, lora_path=str(s.folder / "lora")), "Field required"),
    Case("path left out", lambda s: s.post(LOAD, lora_name="x")),
    Case("name a number", lambda s: s.post(LOAD, lora_name=3, lora_path="x"), "valid string"),
    Case("in place a word", lambda s: s.load("x", "lora", load_inplace="perhaps"), "valid boolean"),
    Case("unknown field", lambda s: s.load("coloured", "lora", colour="red"), "added"),
    Case("body no JSON", lambda s: s.send("POST", LOAD, content=b"{", headers={"content-type": "application/json"})),
    Case("body no object", lambda s: s.send("POST", LOAD, json=[1])),
    Case("body empty", lambda s: s.send("POST", LOAD, headers={"content-type": "application/json"})),
    Case("body a form", lambda s: s.send("POST", LOAD, data={"lora_name": "x", "lora_path": "y"})),
    Case("GET", lambda s: s.send("GET", LOAD)),
    Case("base's name", lambda s: s.load(BASE, "lora"), f"The lora adapter '{BASE}' conflicts with a served base"),
    Case("base's name in place", lambda s: s.load(BASE, "lora", load_inplace=True), "conflicts with a served base"),
    _named("with-dash_and.dot"),
    _named("two words!"),
    _named("org/model"),
    _named("Größe"),
    _named("a" * 101),
    _named(f"name@{'0123456789abcdef' * 4}"),
    Case("path that is not there", lambda s: s.load("x", "nothing"), "No adapter found for"),
    Case(
        "hub name that cannot be had",
        lambda s: s.post(LOAD, lora_name="x", lora_path="nobody/nothing"),
        "No adapter found for",
    ),
    _faulty("broken-json"),
    _faulty("empty-folder", "No adapter found for"),
    _faulty("no-config", "No adapter found for"),
    _faulty("no-tensors"),
    _faulty("rank-1024", "is greater than max_lora_rank"),
    _faulty("dora"),
    _faulty("pissa"),
    _faulty("saved-head"),
    _faulty("saved-norm", "Unsupported modules_to_save"),
    _faulty("bias"),
    _faulty("trained-on-another-model"),
    _faulty("truncated-tensors"),
    _faulty("no-peft-type"),
    Case("path of a file", lambda s: s.load("x", "lora/adapter_config.json")),
    Case("use after faults", lambda s: s.complete("broken-json")),
    Case("faults beside requests", _faults_do_not_hurt_others),
    Case("two loads at once", lambda s: _at_once(s, [lambda: s.load("twice", "lora")] * 2)),
    Case("many", _many),
    Case("unload", lambda s: s.unload("new"), "Success: LoRA adapter 'new' removed successfully."),
    Case("use of what is gone", lambda s: s.complete("new"), "new"),
    Case("chat with what is gone", lambda s: s.chat("new"), "new"),
    Case("unload again", lambda s: s.unload("new"), "The lora adapter 'new' cannot be found."),
    Case("load after unload", lambda s: s.load("new", "lora"), "added successfully"),
    Case("completion after load", lambda s: s.complete("new", logprobs=3)),
    Case("unload by a wrong id", lambda s: s.unload("new", lora_int_id=999), "removed successfully"),
    Case("unload no name", lambda s: s.unload(""), "'lora_name' needs to be provided to unload a LoRA adapter."),
    Case("unload name left out", lambda s: s.post(UNLOAD), "Field required"),
    Case("unload the base", lambda s: s.unload(BASE), "cannot be found"),
    Case("unload the command line's", lambda s: s.unload("lora"), "removed successfully"),
    Case("unknown model", lambda s: s.complete("nobody"), "The model `nobody` does not exist."),
    Case("SageMaker load", lambda s: s.post("/adapters", name="sage", src=str(s.folder / "lora"))),
    Case("SageMaker load again", lambda s: s.post("/adapters", name="sage", src=str(s.folder / "lora"))),
    Case("SageMaker load of nothing", lambda s: s.post("/adapters", name="x", src="/path/does/not/exist")),
    Case("SageMaker load of broken files", lambda s: s.post("/adapters", name="x", src=str(s.folder / "broken-json"))),
    Case("SageMaker invocation", _adapter_of_invocation),
    Case("SageMaker unload", lambda s: s.send("DELETE", "/adapters/sage")),
    Case("SageMaker unload again", lambda s: s.send("DELETE", "/adapters/sage")),
    Case("list at the end", Session.models),
)


def write_faulty(folder: Path) -> None:
    """Directories beside `folder/lora`, each with the fault of its name."""
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")

    def write(name: str, **changes: Any) -> Path:
        shutil.copytree(folder / "lora", folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return folder / name

    def tensors_of(name: str, values: Mapping[str, Any]) -> None:
        save_file(dict(values), write(name) / "adapter_model.safetensors")

    (write("broken-json") / "adapter_config.json").write_text("this is not json")
    (folder / "empty-folder").mkdir()
    (write("no-config") / "adapter_config.json").unlink()
    (write("no-tensors") / "adapter_model.safetensors").unlink()
    write("rank-1024", r=1024)
    write("dora", use_dora=True)
    write("pissa", init_lora_weights="pissa")
    write("saved-head", modules_to_save=["lm_head"])
    write("saved-norm", modules_to_save=["norm"])
    write("bias", bias="all")
    cut = write("truncated-tensors") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-64])
    write("no-peft-type", peft_type=None)
    tensors_of("trained-on-another-model", {k.replace("self_attn", "attn"): v for k, v in tensors.items()})
