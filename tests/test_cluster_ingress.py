"""What the ingress does with a request: names over several base models, retry, versions, loud ends. No Ray is started.

The controllers are real; handles of replicas are scripts.
"""

import asyncio
import threading
import warnings
from types import SimpleNamespace

import pytest
from cluster_support import play, write_adapter

from flora_vllm.cluster.config import ModelConfig, StoreConfig, TimingConfig, to_data
from flora_vllm.cluster.controller import PlacementController
from flora_vllm.cluster.memory import NoRoomError, NotLoadedError
from flora_vllm.cluster.refusals import refusal_of
from flora_vllm.cluster.store import Entry, StaleVersionError, StoreError
from flora_vllm.cluster.streams import ENDED, LostError
from flora_vllm.errors import AdapterError, adapter_error

with warnings.catch_warnings():
    # Ray uses what pydantic deprecated.
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import DeploymentUnavailableError

    from flora_vllm.cluster import ingress
    from flora_vllm.cluster.ingress import Directory, UnknownModelError, answer
    from flora_vllm.cluster.ray_hooks import ask_replicas

pytestmark = pytest.mark.filterwarnings("ignore")

DONE = "data: [DONE]\n\n"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Base models `smol` with poems and prose, `tiny` with prose and one that is called like the other base model."""
    adapters = {"smol": ("poems", "prose"), "tiny": ("prose", "smol")}
    controllers = {}
    for base, names in adapters.items():
        for name in names:
            write_adapter(tmp_path / base, name)
        model = to_data(ModelConfig(base, "/m", adapters=(str(tmp_path / base),)))
        controllers[base] = PlacementController(model, to_data(StoreConfig()), to_data(TimingConfig()))
    monkeypatch.setattr(ingress, "controller_link", lambda _app, deployment: controllers[deployment])
    handles = {
        base: SimpleNamespace(app_name="flora", deployment_name=base, options=lambda base=base, **o: (base, o))
        for base in adapters
    }
    return Directory(handles, refresh_s=60.0)


def test_names_over_several_base_models(directory):
    async def found(name):
        target = await directory.find(name)
        return target.base, None if target.adapter is None else target.adapter.name

    async def run():
        assert await found("smol") == ("smol", None)
        assert await found("poems") == ("smol", "poems")
        assert await found("smol:poems") == ("smol", "poems")
        assert await found("tiny:prose") == ("tiny", "prose")
        assert await found("tiny:smol") == ("tiny", "smol")
        for name, words in (
            ("prose", "smol:prose or tiny:prose"),
            ("nobody", r"^The model `nobody` does not exist\.$"),
            ("tiny:poems", "`tiny:poems` does not exist"),
            ("big:poems", "`big:poems` does not exist"),
            ("long" * 9999, r"^The model `(long)+l…` does not exist\.$"),
            ("lone\ud800", "does not exist"),
            (None, "names no model"),
        ):
            with pytest.raises(UnknownModelError, match=words) as refused:
                await directory.find(name)
            assert len(str(refused.value).encode()) < 300
        listed = [(name, base) for name, base, _ in await directory.listing()]
        assert listed == [("poems", "smol"), ("smol:prose", "smol"), ("tiny:prose", "tiny"), ("tiny:smol", "tiny")]

    asyncio.run(run())


def test_requests_carry_the_adapters_version_to_the_router(directory):
    async def run():
        target = await directory.find("poems")
        assert directory.handle(target) == ("smol", {"stream": True, "multiplexed_model_id": target.adapter.id})
        assert directory.handle(await directory.find("tiny")) == ("tiny", {"stream": True})

    asyncio.run(run())


def test_a_name_that_one_base_model_has_needs_no_look_at_the_others_sources(directory, monkeypatch):
    async def run():
        assert await directory.find("poems")
        asked = []
        for base, view in directory._views.items():
            monkeypatch.setattr(view, "_rescan_since", lambda _, base=base: asked.append(base))
        assert (await directory.find("poems")).base == "smol"
        assert asked == []

    asyncio.run(run())


def ask(directory, *scripts, model="poems", before=None):
    """(chunks of the answer, targets of the attempts); each attempt's script is a list of chunks and exceptions."""
    left, targets = list(scripts), []

    def call(_handle, target):
        targets.append(target)
        if before is not None:
            before(len(targets))
        return play(left.pop(0))

    async def run():
        def refusal(chunk):
            return chunk if isinstance(chunk, int) else None

        return [chunk async for chunk in answer(directory, model, call, refusal, retry_s=30.0)]

    return asyncio.run(run()), targets


def raised_in_a_replica():
    return RayTaskError("completions", "traceback", ValueError("user code"))


def test_a_request_that_reached_no_replica_is_sent_again(directory):
    chunks, targets = ask(directory, [ActorDiedError()], [], [ActorDiedError()], [ActorDiedError()], ["data: x", DONE])
    assert chunks == ["data: x", DONE]
    assert len(targets) == 5


def test_refusals_are_tried_elsewhere_but_not_for_ever(directory):
    assert ask(directory, [503], ["data: x", DONE])[0] == ["data: x", DONE]
    assert ask(directory, [503], [503], [503])[0] == [503]
    # The client's own fault is nobody else's business.
    assert ask(directory, [400])[0] == [400]


def test_an_old_version_is_asked_for_again_as_the_new_one(directory, tmp_path):
    def change(attempt):
        if attempt == 1:
            write_adapter(tmp_path / "smol", "poems", b"new weights")

    chunks, targets = ask(directory, [409], ["data: x", DONE], before=change)
    assert chunks == ["data: x", DONE]
    assert targets[0].adapter.version != targets[1].adapter.version


def test_a_broken_answer_ends_aloud_and_is_not_repeated(directory):
    for fault in (ActorDiedError(), raised_in_a_replica()):
        chunks, targets = ask(directory, ["data: x", fault])
        assert chunks[0] == "data: x"
        assert f'"error": {{"message": "{ENDED}"' in chunks[1]
        assert chunks[1].endswith(DONE)
        assert len(targets) == 1


def test_what_a_replica_raises_at_once_is_not_tried_elsewhere(directory):
    with pytest.raises(RayTaskError, match="traceback"):
        ask(directory, [raised_in_a_replica()])


def test_nobody_there_for_too_long(directory):
    async def run():
        def call(_handle, _target):
            async def chunks():
                raise ActorDiedError()
                yield

            return chunks()

        return [c async for c in answer(directory, "poems", call, lambda _: None, retry_s=0.2)]

    with pytest.raises(LostError, match="ActorDiedError"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            StaleVersionError("s3://bucket/poems no longer has version 1"),
            409,
            "the adapter poems has changed or is gone; ask again",
        ),
        (
            StoreError("cannot fetch s3://bucket/poems: ClientError: An error occurred (403)"),
            503,
            "the adapter poems cannot be fetched now; the replica's log says why",
        ),
        (NoRoomError("all 8 adapter slots are in use"), 503, "all 8 adapter slots are in use"),
        (
            NotLoadedError("the engine could not load poems@1: No space left on device: /cache/poems"),
            503,
            "the adapter poems cannot be loaded now; the replica's log says why",
        ),
        (
            adapter_error("poems", ["file:///a/b c: 3/4 of /cache/poems@1/adapter_model.safetensors, gs://x/y"]),
            400,
            "adapter poems cannot be served (1 fault):\n  - <uri> c: 3/4 of <path>, <uri>",
        ),
        (AdapterError("x" * 99999), 400, None),
    ],
)
def test_a_refusal_is_short_and_names_no_place(caplog, error, status, message):
    entry = Entry("poems", "1", "s3://bucket/poems", 1, 4)
    told = refusal_of(error, entry)
    assert told[0] == status
    assert told[1] == message or (message is None and len(told[1].encode()) == 8 << 10)
    assert str(error) in caplog.text


def test_an_error_is_answered_in_vllms_form():
    from ray import cloudpickle
    from ray.llm._internal.serve.core.ingress.ingress import init, make_fastapi_ingress
    from starlette.testclient import TestClient
    from vllm.exceptions import VLLMValidationError

    from flora_vllm.cluster.ray_hooks import OpenAIHTTPException, more_endpoints
    from flora_vllm.cluster.serve_llm import ANSWERS, ROUTES, FloraIngress

    app = init()
    with more_endpoints(ROUTES, ANSWERS):
        make_fastapi_ingress(FloraIngress, app=app)
    errors = {
        "unknown": OpenAIHTTPException(404, "The model `x` does not exist.", "NotFoundError"),
        "long": OpenAIHTTPException(400, "y" * 99999, "BadRequestError"),
        "later": OpenAIHTTPException(503, "all slots are in use", "NoRoomError"),
        "failed": RayTaskError("chat", "a traceback", RuntimeError("of a library")).as_instanceof_cause(),
        "client": RayTaskError("chat", "a traceback", VLLMValidationError("too many tokens")).as_instanceof_cause(),
    }

    @app.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise errors[name]

    cloudpickle.dumps(app)
    client = TestClient(app)
    answers = {name: client.get(f"/raise/{name}") for name in errors}
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "unknown": 404,
        "long": 400,
        "later": 503,
        "failed": 500,
        "client": 400,
    }
    again = {name: answer.headers["Retry-After"] for name, answer in answers.items() if "Retry-After" in answer.headers}
    assert again == {"later": "5"}
    told = {name: answer.json()["error"] for name, answer in answers.items()}
    assert told["unknown"] == {
        "message": "The model `x` does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    assert len(told["long"]["message"].encode()) == 8 << 10
    assert told["failed"]["message"] == "the replica failed at the request; its log says why"
    assert told["client"]["message"] == "too many tokens"


class Broadcast:
    """A handle whose broadcast ends as the script says."""

    def __init__(self, found):
        self.found = found

    def broadcast(self, method):
        assert method == "flora_metrics"
        return self

    async def results_async(self, *, timeout_s, return_exceptions):
        assert (timeout_s, return_exceptions) == (5.0, True)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_replicas_that_do_not_answer_are_left_out():
    def asked(found):
        return asyncio.run(ask_replicas(Broadcast(found), "flora_metrics", 5.0))

    assert asked([("x", "1"), ActorDiedError(), ("y", "2"), TimeoutError()]) == [("x", "1"), ("y", "2")]
    for error in (DeploymentUnavailableError(DeploymentID("smol", "flora")), TimeoutError(), ActorDiedError()):
        assert asked(error) == []


def test_a_scrape_is_merged_beside_the_streams(monkeypatch):
    from flora_vllm.cluster.serve_llm import FloraIngress

    async def run():
        front = FloraIngress({}, {})
        threads = []

        def merge(answers):
            threads.append(threading.get_ident())
            return b"merged" if answers == [] else b""

        monkeypatch.setattr(front._merged, "merge", merge)
        assert (await front.metrics()).body == b"merged"
        assert threads
        assert threading.get_ident() not in threads

    asyncio.run(run())
