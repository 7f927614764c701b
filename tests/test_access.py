"""Keys, tenants and the adapters they see, without a server; the door, with a bare ASGI app behind it."""

import asyncio
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_support import write_adapter

from flora_vllm.errors import AdapterError, ConfigError
from flora_vllm.formats import content_digest
from flora_vllm.plugin.access import CURRENT, NOBODY, OPERATOR, AccessRules, Keys, ScopedRequests, Tenant
from flora_vllm.plugin.digests import check_digest
from flora_vllm.plugin.gate import Gate
from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.names import MAX_LETTERS, name_fault
from flora_vllm.plugin.routes import path_of

ACME = Tenant("acme", ("acme/*", "shared"), may_load=True, directory="acme")


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def acl(path: Path, *tenants: dict[str, Any]) -> str:
    path.write_text(json.dumps({"tenants": list(tenants)}))
    return str(path)


def entry(name: str = "acme", key: str = "k1", **more: Any) -> dict[str, Any]:
    return {"name": name, "key_sha256": [sha(key)], "adapters": [f"{name}/*"], **more}


@pytest.mark.parametrize(
    "name", ["poems", "team/poems", "smol:italian", "a@b", "v1.2+x=3", "0", "org/repo-name_x", "a" * MAX_LETTERS]
)
def test_names_that_are_allowed(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "name",
    ["", "a" * (MAX_LETTERS + 1), "a" * 1000, "a\nb", "a\0", "a'b", 'a"b', "a,b", "a b", "../../etc", "a/../b", "a//b",
     "/etc", "a/", "a/./b", "\ud800", "é", "\u202ea", "{a}", "-a", ".a", "a\x7f", "a\\b"],
)  # fmt: skip
def test_names_that_are_not(name: str) -> None:
    fault = name_fault(name)
    assert fault is not None
    assert len(fault) < 400
    fault.encode()
    assert fault.isprintable()


def test_names_by_the_operators_expression() -> None:
    assert name_fault("é-1", r"\w+-\d") is None
    assert name_fault("poems", r"\w+-\d") is not None
    assert name_fault("a\nb", r"(?s).*") is not None
    assert name_fault("../a", r".*") is not None


def test_without_keys_everybody_is_the_operator() -> None:
    rules = AccessRules([], None, has_root=False)
    assert rules.keys().holder(None) is OPERATOR
    assert CURRENT.get() is OPERATOR


def test_whose_key(tmp_path: Path) -> None:
    rules = AccessRules(["boss"], acl(tmp_path / "acl", entry()), has_root=False)
    keys = rules.keys()
    assert keys.holder("Bearer boss") is OPERATOR
    assert keys.holder("bearer k1") == Tenant("acme", ("acme/*",), may_load=False)
    for wrong in (None, "", "Bearer", "Bearer k2", "k1", "Basic k1", "Bearer  k1", "Bearer k1 ", "Bearer \xff"):
        assert keys.holder(wrong) is None
    utf8 = Keys({bytes.fromhex(sha("schlüssel")): ACME})
    assert utf8.holder("Bearer " + "schlüssel".encode().decode("latin-1")) is ACME


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_vllm.plugin.access._RECHECK_S", 0.0)
    path = tmp_path / "acl"
    rules = AccessRules(["boss"], acl(path, entry()), has_root=False)
    acl(path, entry(key="k2"), entry("other", "k3"))
    assert (rules.keys().holder("Bearer k1"), rules.keys().holder("Bearer boss")) == (None, OPERATOR)
    assert rules.keys().holder("Bearer k3") == Tenant("other", ("other/*",), may_load=False)
    path.write_text("{")
    assert rules.keys().holder("Bearer k3") is not None, "a broken file changes nothing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "must be"),
        ('{"tenants": [], "x": 1}', "must be"),
        ({"name": "a"}, "a tenant has"),
        (entry(admin=True), "a tenant has"),
        (entry(key_sha256=["k1"]), "64 hexadecimal digits"),
        (entry(adapters="*"), "list of shell patterns"),
        (entry(adapters=[]), "list of shell patterns"),
        (entry(may_load=1), "true or false"),
        (entry(may_load=True), "needs a 'directory'"),
        (entry(may_load=True, directory="../x"), "below the adapter root"),
        (entry(may_load=True, directory="/x"), "below the adapter root"),
    ],
)
def test_a_file_that_makes_no_sense_stops_the_start(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "acl"
    path.write_text(content if isinstance(content, str) else json.dumps({"tenants": [content]}))
    with pytest.raises(ConfigError, match=words):
        AccessRules([], str(path), has_root=True)


def test_one_key_is_one_tenants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a' and 'b' have the same key"):
        AccessRules([], acl(tmp_path / "acl", entry("a"), entry("b")), has_root=False)
    with pytest.raises(ConfigError, match="No such file"):
        AccessRules([], str(tmp_path / "none"), has_root=False)


def test_a_choosers_choice_is_of_whom_the_chooser_is() -> None:
    tenant = Tenant("acme", adapters=("tasks", "acme/*"))
    for name in ("tasks", "tasks?law*0.5+poems*0.5", "acme/x?b*1.0"):
        assert tenant.may_use(name)
    for name in ("task", "other?tasks*1.0", "tasks2?law*1.0", "?acme/x"):
        assert not tenant.may_use(name)
    assert name_fault("tasks?law") is not None


def test_a_mix_is_of_whom_its_parts_are() -> None:
    """Not of whom its name is: nobody gave it one, and `m*` is not meant for it."""
    mix = "mix:acme/a*0.5+shared*0.5"
    table = ScopedRequests({mix: 1})
    table.open_by_parts(mix, ("acme/a", "shared"))
    for tenant, sees in (
        (OPERATOR, True), (ACME, True), (NOBODY, False), (Tenant("m", ("m*",)), False),
        (Tenant("s", ("shared",)), False),
    ):  # fmt: skip
        token = CURRENT.set(tenant)
        try:
            assert (mix in table, mix in list(table), table.get(mix)) == (sees, sees, 1 if sees else None)
        finally:
            CURRENT.reset(token)
    assert table.pop(mix) == 1
    table[mix] = 2
    token = CURRENT.set(ACME)
    try:
        assert mix not in table
    finally:
        CURRENT.reset(token)


def test_each_tenant_sees_its_own() -> None:
    table = ScopedRequests({"acme/a": 1, "shared": 2, "other/b": 3})
    assert (len(table), list(table), table["other/b"]) == (3, ["acme/a", "shared", "other/b"], 3)
    token = CURRENT.set(ACME)
    try:
        assert list(table) == list(table.keys()) == ["acme/a", "shared"]
        assert (list(table.values()), list(table.items())) == ([1, 2], [("acme/a", 1), ("shared", 2)])
        assert ("other/b" in table, table.get("other/b"), table.pop("other/b", None), len(table)) == (
            False,
            None,
            None,
            2,
        )
        with pytest.raises(KeyError):
            table["other/b"]
        with pytest.raises(KeyError):
            del table["other/b"]
        assert None not in table
        assert table.pop("acme/a") == 1
        table["acme/c"] = 4
    finally:
        CURRENT.reset(token)
    assert dict(table.items()) == {"shared": 2, "other/b": 3, "acme/c": 4}
    token = CURRENT.set(NOBODY)
    try:
        assert (len(table), list(table.items()), bool(table)) == (0, [], False)
    finally:
        CURRENT.reset(token)


def through(
    rules: AccessRules, method: str, path: str, key: str | None = None, kind: str = "http", root_path: str = ""
) -> tuple[Any, Any]:
    """(status or close code that the gate gave, tenant that the app saw)."""
    seen: list[Tenant] = []
    sent: list[dict] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(CURRENT.get())

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope: dict[str, Any] = {"type": kind, "path": path, "root_path": root_path, "headers": headers}
    if kind == "http":
        scope["method"] = method
    asyncio.run(Gate(app, rules)(scope, receive, send))
    assert CURRENT.get() is OPERATOR
    return (sent[0].get("status") or sent[0].get("code")) if sent else None, seen[0] if seen else None


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/adapters"), ("DELETE", "/adapters/x"), ("POST", "/invocations"), ("POST", "//invocations"),
     ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/pooling"),
     ("PUT", "/anything"), ("POST", "/sleep")],
)  # fmt: skip
def test_what_needs_a_key(method: str, path: str) -> None:
    rules = AccessRules(["boss"], None, has_root=False)
    assert through(rules, method, path) == (401, None)
    assert through(rules, method, path, "wrong") == (401, None)
    assert through(rules, method, path, "boss") == (None, OPERATOR)
    assert through(AccessRules([], None, has_root=False), method, path) == (None, OPERATOR)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("POST", "/ping"), ("GET", "/ping"), ("GET", "/version"), ("OPTIONS", "/v1/models")],
)
def test_what_stays_open(method: str, path: str) -> None:
    assert through(AccessRules(["boss"], None, has_root=False), method, path) == (None, NOBODY)


def test_tenants_at_the_door(tmp_path: Path) -> None:
    rules = AccessRules(["boss"], acl(tmp_path / "acl", entry()), has_root=False)
    assert through(rules, "POST", "/v1/completions", "k1")[1] == Tenant("acme", ("acme/*",), may_load=False)
    for method in ("GET", "HEAD", "OPTIONS"):
        assert through(rules, method, "/metrics") == (401, None), "labels name everybody's adapters"
    assert through(AccessRules(["boss"], None, has_root=False), "GET", "/metrics") == (None, NOBODY)
    assert through(rules, "", "/v1/realtime", kind="websocket") == (1008, None)


@pytest.mark.parametrize("root", ["/m", "/metric", "/v", "/", "/x", "/open"])
def test_a_root_path_opens_nothing(root: str, tmp_path: Path) -> None:
    """It is taken off where vLLM's router takes it off, and only there."""
    from starlette._utils import get_route_path

    rules = AccessRules(["boss"], acl(tmp_path / "acl", entry()), has_root=False)
    for path in ("/metrics", "/v1/models", "/v1/flora/adapters", "/openapi.json"):
        for asked in (path, f"{root}{path}"):
            assert get_route_path({"path": asked, "root_path": root}) == path_of({"path": asked, "root_path": root})
            assert through(rules, "GET", asked, root_path=root)[0] == 401, asked
    assert through(rules, "POST", f"{root}/sleep", "k1", root_path=root)[0] == 403
    assert through(rules, "POST", f"{root}/v1/completions", "k1", root_path=root)[1] is not None


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/sleep"), ("POST", "/collective_rpc"), ("POST", "/scale_elastic_ep"), ("POST", "/pause"), ("PUT", "/x"),
     ("POST", "/inference/v1/abort_requests"), ("POST", "/start_profile"), ("POST", "/update_weights"),
     ("GET", "/server_info"), ("GET", "/kv_event_sources")],
)  # fmt: skip
def test_what_acts_on_the_engine_of_all_is_the_operators(method: str, path: str, tmp_path: Path) -> None:
    rules = AccessRules(["boss"], acl(tmp_path / "acl", entry()), has_root=False)
    assert through(rules, method, path) == (401, None)
    assert through(rules, method, path, "k1") == (403, None)
    assert through(rules, method, path, "boss") == (None, OPERATOR)


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/load_lora_adapter", "/v1/responses/x/cancel", "/v2/rerank", "/cohere/v2/chat", "/tokenize",
     "/detokenize", "/pooling", "/classify", "/score", "/rerank", "/inference/v1/generate", "/invocations", "/adapters",
     "/ping"],
)  # fmt: skip
def test_what_tenants_may_ask(path: str, tmp_path: Path) -> None:
    rules = AccessRules(["boss"], acl(tmp_path / "acl", entry()), has_root=False)
    assert through(rules, "POST", path, "k1")[1] == Tenant("acme", ("acme/*",), may_load=False)


def test_parts_of_a_mix_that_comes_back_are_on_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flora_vllm.plugin import frontend, mixes

    (tmp_path / "list").write_text(f"{'a' * 64}  poems\n")
    monkeypatch.setattr(frontend, "digest_and_family", lambda path, _: (path[-1] * 64, "LORA"))
    config = SimpleNamespace(additional_config={"flora": {"adapter_digests": str(tmp_path / "list")}})
    models = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))
    path = mixes.encoded(mixes.Mix((mixes.Part(1.0, "poems", "/a"), mixes.Part(1.0, "prose", "/b"))))
    request = SimpleNamespace(lora_name="both", lora_path=path)
    with pytest.raises(AdapterError, match=r"(?s)prose.* is not on the operator's list"):
        asyncio.run(frontend._identify(models, request, confined=False))


def test_an_engine_without_a_server_loads_what_is_on_the_list(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    from flora_vllm.plugin import preload

    path, listed = write_adapter(tmp_path, "a"), tmp_path / "list"
    config = SimpleNamespace(additional_config={"flora": {"adapter_digests": str(listed)}})
    engine, loaded = SimpleNamespace(vllm_config=config), []
    listed.write_text(f"{'0' * 64}\n")
    for load, run in ((preload._load, lambda result: result), (preload._load_async, asyncio.run)):
        asked = LoRARequest("a", 1, str(path))
        with pytest.raises(AdapterError, match=r"(?s)^adapter 'a' .* is not on the operator's list"):
            run(load(engine, asked, loaded.append))
    assert not loaded
    listed.write_text(f"{content_digest(path)}\n")
    preload._load(engine, LoRARequest("a", 1, str(path)), loaded.append)
    assert [split_identity(request.lora_name)[0] for request in loaded] == ["a"]


def test_digests(tmp_path: Path) -> None:
    check_digest(None, "a", "ff")
    path = tmp_path / "digests"
    path.write_text(f"{'a' * 64}  poems\n\n{'B' * 64}\n")
    check_digest(str(path), "a", "a" * 64)
    check_digest(str(path), "a", "b" * 64)
    with pytest.raises(AdapterError, match="is not on the operator's list"):
        check_digest(str(path), "a", "a" * 16)
    path.unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        check_digest(str(path), "a", "a" * 64)
