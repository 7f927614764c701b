"""What an answer may say, without a server."""

import asyncio
import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.errors import adapter_error, without_paths
from flora_vllm.formats import write_flora
from flora_vllm.plugin import flags, frontend, gate, guard, handed, mix_requests
from flora_vllm.plugin.access import CURRENT, NOBODY, Tenant
from flora_vllm.plugin.guard import Locks, presentable
from flora_vllm.plugin.mixes import Mix, Part, encoded
from flora_vllm.plugin.options import FloraOptions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def answer(message: str, code: int = 400) -> SimpleNamespace:
    return SimpleNamespace(error=SimpleNamespace(message=message, code=code))


@pytest.mark.parametrize(
    ("message", "sent", "shown"),
    [
        (
            "adapter 'a' (/srv/adapters/team/a): missing",
            "/srv/adapters/team/a",
            "adapter 'a' (/srv/adapters/team/a): missing",
        ),
        ("adapter 'a' (/srv/adapters/team/a): missing", "team/a", "adapter 'a' (<path>): missing"),
        ("adapter 'a' (/srv/adapters/v3)", "/srv/adapters/current", "adapter 'a' (<path>)"),
        ("kept in '/var/flora-adapters-x/7'", None, "kept in '<path>'"),
        ("rank 1/2 of model.layers.0, 3/4/5", None, "rank 1/2 of model.layers.0, 3/4/5"),
        ("org/name is no directory", "org/name", "org/name is no directory"),
        ("https://example.com/a/b", None, "https://example.com/a/b"),
    ],
)
def test_paths_in_messages(message: str, sent: str | None, shown: str) -> None:
    assert without_paths(message, sent) == shown


def test_the_servers_own_errors_are_not_told() -> None:
    assert presentable(answer("CUDA error at /usr/lib/x", 500), None).error.message == (
        "the server could not load the adapter; its log says why"
    )
    assert presentable(answer("x" * 100_000), None).error.message.endswith("…")
    assert presentable("name@digest", None) == "name@digest"


def test_locks_are_kept_while_somebody_holds_them() -> None:
    locks = Locks()
    held = locks["a"]
    assert locks["a"] is held
    for i in range(1000):
        locks[f"n{i}"]
    assert len(locks._locks) == 1
    del held
    assert len(locks._locks) == 0


class Engine:
    """What OpenAIServingModels reads of an engine client; it loads nothing."""

    def __init__(self, options: dict, servers: int = 1, rank: int = 0) -> None:
        beside = SimpleNamespace(_api_process_count=servers, _api_process_rank=rank, data_parallel_size=1)
        self.vllm_config = SimpleNamespace(additional_config={"flora": options}, parallel_config=beside)
        self.model_config = SimpleNamespace(model="base", max_model_len=8)
        self.renderer = self.input_processor = None

    async def add_lora(self, request: object) -> bool:
        raise RuntimeError("out of memory in /usr/lib/cuda/x.so")


@pytest.fixture(scope="module")
def serving() -> Iterator[Any]:
    """vLLM's own class, wrapped as in a server."""
    module = importlib.import_module("vllm.entrypoints.openai.models.serving")
    texts = [importlib.import_module(f"vllm.entrypoints.serve.exception_handling.{name}") for name in ERROR_TEXTS]
    before = [(module.OpenAIServingModels, dict(vars(module.OpenAIServingModels)))] + [
        (t, dict(vars(t))) for t in texts
    ]
    frontend.install()
    guard.install()
    guard.install()
    yield module.OpenAIServingModels
    for owner, attributes in before:
        for name in vars(owner).keys() - attributes.keys():
            delattr(owner, name)
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


ERROR_TEXTS = ("error_response", "handlers.http", "handlers.validation")


class Asked(SimpleNamespace):
    """A request, to which weak references are possible, as to vLLM's."""


def load(serving: Any, name: str, path: str, **options: Any) -> Any:
    protocol = importlib.import_module("vllm.entrypoints.serve.lora.protocol")
    models = serving(Engine(options), [SimpleNamespace(name="base", model_path="base")])
    request = protocol.LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
    return asyncio.run(models.load_lora_adapter(request)).error


def test_loads_through_vllms_own_class(serving: Any, tmp_path: Path) -> None:
    write_flora(tmp_path / "root" / "a", {"layers.0.q_proj": (torch.ones(1, 4), torch.ones(4, 1))})
    assert "is too long" in load(serving, "n" * 1000, "a").message
    assert load(serving, "\ud800", "a").code == 400
    assert "no file system has" in load(serving, "a", "\ud800").message
    missing = load(serving, "a", "/nowhere/at/all")
    assert (missing.code, "/nowhere/at/all" in missing.message) == (404, True)
    below = load(serving, "a", "b", adapter_root=str(tmp_path / "root"))
    assert (below.code, str(tmp_path) in below.message) == (400, False)
    failed = load(serving, "a", "a", adapter_root=str(tmp_path / "root"))
    assert (failed.code, failed.message) == (500, "the server could not load the adapter; its log says why")
    (tmp_path / "digests").write_text("")
    unlisted = load(serving, "a", "a", adapter_root=str(tmp_path / "root"), adapter_digests=str(tmp_path / "digests"))
    assert (unlisted.code, "is not on the operator's list" in unlisted.message) == (400, True)


def test_a_refusal_of_an_upload_names_no_path() -> None:
    """Its client sent none; vLLM itself hides those of some directories only."""
    models = SimpleNamespace(static_lora_modules=[])

    def refused(path: str) -> str:
        async def load(*_: Any) -> Any:
            return SimpleNamespace(error=SimpleNamespace(code=400, message=f"'a' ({path}) cannot be served"))

        asked = guard._load(load, models, FloraOptions(), SimpleNamespace(lora_name="a", lora_path=path))
        return asyncio.run(asked).error.message

    with handed.directory_of(b"{}", b"weights") as path:
        assert refused(path) == "'a' (<path>) cannot be served"
    assert refused("/of/the/client") == "'a' (/of/the/client) cannot be served"


def test_keeps_the_words_of_stock_that_clients_match(serving: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("/nowhere/at/all", str(tmp_path / "empty")):
        missing = load(serving, "a", path)
        assert missing.code == 404
        assert "No adapter found for " in missing.message
    below = load(serving, "a", "empty", adapter_root=str(tmp_path))  # what lies below a root is told to nobody
    assert (below.code, "No adapter found" in below.message) == (400, False)
    for name, path in (("", "a"), ("a", "")):
        nameless = load(serving, name, path)
        assert (nameless.code, nameless.type) == (400, "InvalidUserInput")
        assert nameless.message == "Both 'lora_name' and 'lora_path' must be provided."


def test_unloads_and_requests_through_vllms_own_class(serving: Any) -> None:
    protocol = importlib.import_module("vllm.entrypoints.serve.lora.protocol")
    models = serving(Engine({}), [SimpleNamespace(name="base", model_path="base")])
    unloaded = asyncio.run(models.unload_lora_adapter(protocol.UnloadLoRAAdapterRequest(lora_name="x" * 5000))).error
    assert (unloaded.code, len(unloaded.message) < 400) == (404, True)
    unloaded = asyncio.run(models.unload_lora_adapter(protocol.UnloadLoRAAdapterRequest(lora_name="x"))).error
    assert unloaded.message == "The lora adapter 'x' cannot be found."
    for name in ("../../etc", "x" * 5000, "\ud800"):
        found = asyncio.run(models.resolve_lora(name)).error
        assert (found.code, len(found.message) < 400) == (404, True)
        found.message.encode()
    token = CURRENT.set(NOBODY)
    try:
        refused = asyncio.run(models.load_lora_adapter(protocol.LoadLoRAAdapterRequest(lora_name="a", lora_path="a")))
        assert refused.error.code == 403
    finally:
        CURRENT.reset(token)


def test_what_the_command_line_names_is_confined_for_tenants(serving: Any, tmp_path: Path) -> None:
    protocol = importlib.import_module("vllm.entrypoints.serve.lora.protocol")
    write_flora(tmp_path / "away", {"layers.0.q_proj": (torch.ones(1, 4), torch.ones(4, 1))})
    (tmp_path / "root").mkdir()
    models = serving(
        Engine({"adapter_root": str(tmp_path / "root")}),
        [SimpleNamespace(name="base", model_path="base")],
        lora_modules=[SimpleNamespace(name="acme/a", path=str(tmp_path / "away"))],
    )
    request = protocol.LoadLoRAAdapterRequest(lora_name="acme/a", lora_path=str(tmp_path / "away"))
    assert asyncio.run(models.load_lora_adapter(request)).error.code == 500, "it is read, and this engine loads nothing"
    token = CURRENT.set(Tenant("acme", ("acme/*",)))
    try:
        assert asyncio.run(models.load_lora_adapter(request)).error.code == 400
    finally:
        CURRENT.reset(token)


def test_a_mix_as_the_engine_knows_it_is_not_a_clients_to_give(serving: Any) -> None:
    begin = time.thread_time()
    refused = load(serving, "a", "mix:[[a*" + "1" * 100_000 + "x")
    assert (refused.code, len(refused.message) < 8192) == (400, True)
    assert time.thread_time() - begin < 1, "in the server's event loop"


def test_the_place_of_a_fault_is_short(serving: Any) -> None:
    module = importlib.import_module("vllm.entrypoints.serve.exception_handling.handlers.validation")
    assert len(module.clean_loc_for_param(("body", "mix", "A" * 1_000_000))) < 9000
    assert module.clean_loc_for_param(("body", "mix")) == "body.mix"


def test_tenants_do_not_see_the_parts_of_an_operators_mix(serving: Any) -> None:
    models = serving(Engine({}), [SimpleNamespace(name="base", model_path="base")])
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    path = encoded(Mix((Part(1.0, "globex/secret@0", "/srv/root/secret"),)))
    models.lora_requests["acme/m"] = lora_request(f"acme/m@{'0' * 64}", 1, path)

    def roots() -> list[str]:
        return [card.root for card in asyncio.run(models.show_available_models()).data if card.id == "acme/m"]

    assert roots() == [path]
    token = CURRENT.set(Tenant("acme", ("acme/*",)))
    try:
        assert roots() == ["acme/m"]
    finally:
        CURRENT.reset(token)


def test_mixes_of_a_request_are_of_whom_their_parts_are(serving: Any) -> None:
    """Asked for, used again and listed by a tenant of the parts; by no other, whatever its patterns; no path told."""

    class Loading(Engine):
        fault: str | None = None

        async def add_lora(self, request: Any) -> None:
            if self.fault is not None:
                raise RuntimeError(self.fault)

    engine = Loading({})
    models = serving(engine, [SimpleNamespace(name="base", model_path="base")])
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    for number, name in enumerate(("acme/a", "mine"), 1):
        models.lora_requests[name] = lora_request(f"{name}@{'0' * 64}", number, f"/srv/root/{name}")
    server = SimpleNamespace(models=models, _is_model_supported=lambda name: name == "base")

    def ask(tenant: Tenant, part: str) -> tuple[str, Any, bool]:
        request = Asked(model="base", model_extra={"flora": {"mix": {part: 0.5}}})
        token = CURRENT.set(tenant)
        try:
            refused = asyncio.run(mix_requests.choose(server, request))
            return request.model, refused and refused.error, request.model in models.lora_requests
        finally:
            CURRENT.reset(token)

    acme, other = Tenant("acme", ("acme/*",)), Tenant("m", ("m*",))
    for _ in range(2):
        assert ask(acme, "acme/a") == ("mix:acme/a*0.5", None, True)
    assert ask(other, "mine") == ("mix:mine*0.5", None, True)
    token = CURRENT.set(other)
    try:
        assert list(models.lora_requests) == ["mine", "mix:mine*0.5"]
    finally:
        CURRENT.reset(token)
    assert ask(acme, "mix:acme/a*0.5")[1:] == (None, True)
    token = CURRENT.set(other)
    try:
        assert list(models.lora_requests) == ["mine", "mix:mine*0.5"], "a mix of a mix is of the same tenants"
    finally:
        CURRENT.reset(token)
    theirs, nobodys = (ask(other, name)[1].message for name in ("acme/a", "acme/b"))
    assert theirs.replace("acme/a", "acme/b") == nobodys
    engine.fault = str(adapter_error("'mine' (/srv/root/mine)", ["the directory changed"]))
    models.lora_requests.pop("mix:mine*0.5")
    refused = ask(other, "mine")[1]
    assert (refused.code, "/srv" in refused.message, "changed" in refused.message) == (400, False, True)
    engine.fault = "out of memory in /usr/lib/cuda/x.so"
    assert ask(other, "mine")[1].message == "the server could not load the adapter; its log says why"


def test_servers_of_one_engine_give_no_id_to_two_mixes_and_no_mix_two_ids(serving: Any) -> None:
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    given: list[tuple[int, str]] = []

    class Loading(Engine):
        async def add_lora(self, request: Any) -> None:
            given.append((request.lora_int_id, request.lora_name))

    for rank, weights in ((0, (0.5, 0.25)), (1, (0.25, 0.5, 0.75))):
        models = serving(Loading({}, 2, rank), [SimpleNamespace(name="base", model_path="base")])
        models.lora_requests["a"] = lora_request(f"a@{'0' * 64}", models.lora_id_counter.inc(1), "/a")
        server = SimpleNamespace(models=models, _is_model_supported=lambda name: name == "base")
        for weight in weights:
            request = Asked(model="base", model_extra={"flora": {"mix": {"a": weight}}})
            assert asyncio.run(mix_requests.choose(server, request)) is None
    assert len(given) == len({number for number, _ in given}) == len({name for _, name in given}) == 5
    assert all(1 << 30 <= number < 1 << 31 for number, _ in given)


def test_the_app_has_the_gate(tmp_path: Path) -> None:
    """vLLM's own app of a server's command line: the gate is its outermost layer, and stands alone beside an ACL."""
    launcher = importlib.import_module("vllm.entrypoints.launchers.app")
    cli_args = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    parsing = importlib.import_module("vllm.utils.argparse_utils")
    before = launcher.init_entrypoints_middleware
    (tmp_path / "acl").write_text('{"tenants": []}')
    flags.install()
    gate.install()
    gate.install()
    try:
        found, known = {}, ("Gate", "AuthenticationMiddleware", "TenantsMedia")
        for case, words in (
            ("plain", ["--api-key", "k"]),
            ("keys", ["--api-key", "k", "--enable-flora"]),
            ("acl", ["--api-key", "k", "--enable-flora", "--adapter-acl", str(tmp_path / "acl")]),
        ):
            args = cli_args.make_arg_parser(parsing.FlexibleArgumentParser()).parse_args(["--model", "x", *words])
            layers = [layer.cls.__name__ for layer in launcher.build_app(args, ("generate",)).user_middleware]
            found[case] = [name for name in layers if name in known]
        assert found == {
            "plain": ["AuthenticationMiddleware"],
            "keys": ["Gate", "AuthenticationMiddleware"],
            "acl": ["Gate", "TenantsMedia"],
        }
    finally:
        launcher.init_entrypoints_middleware = before
