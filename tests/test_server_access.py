"""A server with keys, tenants and a root: who sees, uses and loads what, and what surprising clients are told."""

import hashlib
import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_support import BASE, World, make_ask, make_world, serving

from flora_vllm.errors import MAX_MESSAGE_BYTES
from flora_vllm.formats import content_digest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# /invocations takes the adapter's name from here and ignores the body's `model`.
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
OPERATOR, ACME, OTHER = "key-of-the-operator", "key-of-acme", "key-of-other"


def tenant(name: str, key: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "key_sha256": [hashlib.sha256(key.encode()).hexdigest()], "adapters": [f"{name}/*"], **more}


class Door:
    """One server, asked with any key or none."""

    def __init__(self, url: str) -> None:
        self.root = url.removesuffix("/v1")

    def ask(
        self, method: str, route: str, key: str | None = None, body: Any = None, named: str | None = None
    ) -> tuple[int, str]:
        """(status, text), short and valid text whatever the answer. `named`: the adapter as SageMaker sends it."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        headers |= {ADAPTER_HEADER: named} if named else {}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.root + route, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read()
            assert len(text) <= MAX_MESSAGE_BYTES + 512, (route, len(text))
            return error.code, text.decode()

    def load(self, key: str | None, name: str, path: Path | str) -> tuple[int, str]:
        return self.ask("POST", "/v1/load_lora_adapter", key, {"lora_name": name, "lora_path": str(path)})

    def unload(self, key: str | None, name: str) -> tuple[int, str]:
        return self.ask("POST", "/v1/unload_lora_adapter", key, {"lora_name": name})

    def complete(self, key: str | None, model: str, route: str = "/v1/completions") -> tuple[int, str]:
        body = {"model": model, "prompt": list(make_ask(1).prompt), "max_tokens": 4, "temperature": 0}
        return self.ask("POST", route, key, body, model if route == "/invocations" else None)

    def listed(self, key: str) -> set[str]:
        """Names of adapters by our own route."""
        status, text = self.ask("GET", "/v1/flora/adapters", key)
        assert status == 200
        return {entry["name"] for entry in json.loads(text)["data"]}

    def names(self, key: str) -> set[str]:
        status, text = self.ask("GET", "/v1/models", key)
        assert status == 200
        return {card["id"] for card in json.loads(text)["data"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def door(world: World, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("rules")
    for place, name in (("acme/mine", "flora1"), ("other/theirs", "flora2"), ("acme/unlisted", "hira")):
        shutil.copytree(world.adapters[name], root / place)
    shutil.copytree(world.adapters["flora1"], root / "acme" / "broken-7")
    (root / "acme" / "broken-7" / "adapter_config.json").write_text("{")
    acme = tenant("acme", ACME, may_load=True, directory="acme")
    (folder / "acl.json").write_text(json.dumps({"tenants": [acme, tenant("other", OTHER)]}))
    allowed = [*(world.adapters[name] for name in ("flora1", "flora2", "lora")), root / "acme" / "broken-7"]
    listed = [content_digest(path) for path in allowed]
    (folder / "digests").write_text("".join(f"{digest}  as reviewed\n" for digest in listed))
    options = ["--max-loras", "4", "--max-flora-rank", "8", "--flora-adapter-root", str(root), "--api-key", OPERATOR]
    options += ["--adapter-acl", str(folder / "acl.json"), "--flora-adapter-digests", str(folder / "digests")]
    environment = {"VLLM_LORA_RESOLVER_CACHE_DIR": str(root)}
    with serving(world.model, {"lora": world.adapters["lora"]}, *options, environment=environment) as client:
        door = Door(client.url)
        assert door.load(OPERATOR, "other/theirs", "other/theirs")[0] == 200
        yield door


@pytest.mark.parametrize("key", [None, "wrong"])
def test_nothing_is_done_without_a_key(key: str | None, door: Door) -> None:
    for method, route, body in (
        ("POST", "/adapters", {"name": "acme/mine", "src": "acme/mine"}),
        ("DELETE", "/adapters/lora", None),
        ("POST", "/invocations", {"model": "lora", "prompt": "a"}),
        ("POST", "/tokenize", {"model": "lora", "prompt": "a"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "acme/mine"}),
        ("POST", "/v1/completions", {"model": "lora", "prompt": "a"}),
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
        ("GET", "/v1/flora/adapters", None),
    ):
        assert door.ask(method, route, key, body) == (401, '{"error": "Unauthorized"}'), route
    assert door.ask("GET", "/health", key)[0] == 200
    assert door.names(OPERATOR) == {BASE, "lora", "other/theirs"}


def test_the_operator_may_do_everything(door: Door) -> None:
    for model in (BASE, "lora", "other/theirs"):
        assert door.complete(OPERATOR, model)[0] == 200
    assert door.complete(OPERATOR, "lora", "/invocations")[0] == 200
    assert door.ask("POST", "/adapters", OPERATOR, {"name": "mine", "src": "acme/mine"})[0] == 200
    assert door.ask("DELETE", "/adapters/mine", OPERATOR)[0] == 200
    assert door.ask("GET", "/metrics", OPERATOR)[0] == 200


def test_a_tenant_sees_and_uses_its_own(door: Door) -> None:
    assert door.names(ACME) == {BASE}
    assert door.names(OTHER) == {BASE, "other/theirs"}
    assert door.complete(OTHER, "other/theirs")[0] == 200
    assert door.complete(ACME, BASE)[0] == 200
    assert door.complete(ACME, "acme/mine")[0] == 200, "found below the resolver's directory"
    assert door.names(ACME) == {BASE, "acme/mine"}
    assert (door.listed(ACME), door.listed(OTHER)) == ({"acme/mine"}, {"other/theirs"})
    assert door.listed(OPERATOR) >= {"acme/mine", "other/theirs", "lora"}
    theirs = re.findall(r'lora_adapter_loaded{adapter_name="([^"]*)"', door.ask("GET", "/metrics", OTHER)[1])
    assert {"other/theirs"} <= {*theirs} <= {"other/theirs", "other"}
    for route in ("/v1/completions", "/invocations"):
        theirs, nobodys = (door.complete(ACME, name, route) for name in ("other/theirs", "other/nobodys"))
        assert theirs[0] == nobodys[0] == 404
        assert theirs[1].replace("theirs", "nobodys") == nobodys[1], "the answer tells whether it exists"
    theirs, nobodys = (door.unload(ACME, name) for name in ("other/theirs", "other/nobodys"))
    assert (theirs[0], theirs[1].replace("theirs", "nobodys")) == (404, nobodys[1])


def test_a_tenant_loads_from_its_directory_under_its_names(door: Door, root: Path) -> None:
    assert door.load(ACME, "acme/second", "mine")[0] == 200
    assert door.unload(ACME, "acme/second")[0] == 200
    for name, path, status in (
        ("other/second", "mine", 403),
        ("second", "mine", 403),
        ("acme/second", "other/theirs", 400),
        ("acme/second", root / "other" / "theirs", 400),
        ("acme/second", "../other/theirs", 400),
    ):
        assert door.load(ACME, name, path)[0] == status, (name, path)
    for result in (door.load(OTHER, "other/second", "theirs"), door.unload(OTHER, "other/theirs")):
        assert result[0] == 403
    assert door.names(OPERATOR) >= {"other/theirs"}


def test_only_listed_digests_are_loaded(door: Door) -> None:
    status, text = door.load(OPERATOR, "unlisted", "acme/unlisted")
    assert (status, "is not on the operator's list" in text) == (400, True)
    assert door.complete(ACME, "acme/unlisted")[0] == 400


SURPRISING = ["", "a" * 1000, "a\nb", "a\0b", 'a"b', "a'b", "a,b", "../../etc", "/etc/passwd", "a//b", "\ud800",
              "\u202e", "acme/../other/theirs", "x" * 200, "acme/" + "y" * 250, "{}", "${x}"]  # fmt: skip


@pytest.mark.parametrize("name", SURPRISING)
def test_surprising_names(name: str, door: Door) -> None:
    """Each a 4xx, none of them kept or looked up."""
    for status, text in (
        door.load(OPERATOR, name, "acme/nowhere"),
        door.unload(OPERATOR, name),
        door.ask("POST", "/adapters", OPERATOR, {"name": name, "src": "acme/nowhere"}),
    ):
        assert 400 <= status < 500, text
    if name:  # none at all is the base model
        for route in ("/v1/completions", "/v1/chat/completions", "/invocations"):
            body = {"model": name, "max_tokens": 1, "prompt": "a"}
            if "chat" in route:
                body = {"model": name, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
            named = name if route == "/invocations" else None
            if named and not (named.isascii() and named.isprintable()):
                continue  # no header can hold it
            status, text = door.ask("POST", route, OPERATOR, body, named)
            assert 400 <= status < 500, (route, text)
    assert door.names(OPERATOR) <= {BASE, "lora", "other/theirs", "acme/mine"}


@pytest.mark.parametrize(
    "path", ["", "a" * 300, "a/" * 3000, "\0", "\ud800", "~root", "org/name", "file:///etc", ".", "/"]
)
def test_surprising_paths(path: str, door: Door, root: Path) -> None:
    status, text = door.load(OPERATOR, "surprise", path)
    assert 400 <= status < 500, text
    assert str(root) not in text
    assert "/tmp/" not in text


def test_answers_name_no_path_that_was_not_sent(door: Door, root: Path) -> None:
    (root / "acme" / "alias").symlink_to(root / "acme" / "broken-7")
    for key, name, path in ((OPERATOR, "b", "acme/alias"), (ACME, "acme/b", "alias")):
        status, text = door.load(key, name, path)
        assert status == 400
        assert "not valid JSON" in text
        assert "broken-7" not in text
        assert str(root) not in text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"lora_name": 1, "lora_path": 2}', b"\xff\xfe", b"[" * 100_000,
     b'{"lora_name": "a"}', b'{"lora_name": "a", "lora_path": "b", "load_inplace": "maybe"}',
     b'{"lora_name": "' + b"n" * 2_000_000 + b'", "lora_path": "' + b"p" * 2_000_000 + b'"}'],
)  # fmt: skip
def test_surprising_bodies(body: bytes, door: Door) -> None:
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
        status, text = door.ask("POST", route, OPERATOR, body)
        assert 400 <= status < 500, (route, text)
