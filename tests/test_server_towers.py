"""Images in chats through the real server, each request with the tower, connector and language adapters it names."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import engine_support as support
import pytest
from engine_support import Answer
from server_support import BASE, Client, serving
from tiny_models import tiny_idefics3
from tower_support import Seen, World, image_of
from transformers import AutoConfig

pytestmark = support.ENGINE_MARKS

LABELS = ("language", "tower", "connector", "all", "flora")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_idefics3(tmp_path_factory.mktemp("idefics3")), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    adapters = {label: path for label, path in world.paths.items() if label in LABELS and path is not None}
    options = ("--enable-tower-connector-lora", "--enforce-eager", "--max-loras", "6", "--max-lora-rank", "8")
    with serving(world.model, adapters, *options) as client:
        yield client


def _chat(client: Client, ask: Seen, image_token: int) -> tuple[list[int], Answer]:
    """The prompt's tokens, with the images' among them, and the answer."""
    content: list[Any] = [{"type": "text", "text": "What?"}]
    for seed in ask.images:
        image = io.BytesIO()
        image_of(seed).save(image, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    chat: Any = client.openai.chat.completions.create(
        model=ask.adapter or BASE,
        messages=[{"role": "user", "content": content}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=5,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True},
        logit_bias={str(image_token): -100},  # an answer that names an image would be no text to transformers
    )

    def number(place: Any) -> int:
        return int(place.token.removeprefix("token_id:"))

    places = chat.choices[0].logprobs.content
    tops = tuple({number(top): top.logprob for top in place.top_logprobs} for place in places)
    return list(chat.prompt_token_ids), Answer(tuple(map(number, places)), tops)


def test_images_in_chats_are_seen_through_the_adapter_that_is_named(world, client):
    image_token = AutoConfig.from_pretrained(world.model).image_token_id
    asks = [Seen((seed,), label) for seed in (1, 2) for label in (None, *LABELS)]
    with ThreadPoolExecutor(len(asks)) as pool:
        chats = list(pool.map(lambda ask: _chat(client, ask, image_token), asks))
    errors = {ask: world.error(ask, answer, prompt) for ask, (prompt, answer) in zip(asks, chats, strict=True)}
    assert not {ask: error for ask, error in errors.items() if error >= support.LOGPROB_TOLERANCE}
