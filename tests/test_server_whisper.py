"""/v1/audio/transcriptions through the real server and the `openai` client, the adapter picked by `model`."""

import io
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import transformers
from server_support import BASE, Client, serving
from tiny_models import tiny_whisper
from whisper_support import RATE_HZ, World, audio_of

pytest.importorskip("soundfile", reason="vLLM's server decodes audio with soundfile: pip install 'flora-vllm[speech]'")

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_whisper(tmp_path_factory.mktemp("whisper")), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    adapters = {label: path for label, path in world.paths.items() if label is not None and path is not None}
    with serving(world.model, adapters, "--max-model-len", "64") as client:
        yield client


def wav(samples: np.ndarray) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(np.round(samples * 32768).astype("<i2").tobytes())
    return content.getvalue()


def transcribe(client: Client, model: str, audio: int) -> str:
    answer = client.openai.audio.transcriptions.create(
        model=model,
        file=("audio.wav", wav(audio_of(audio))),
        language="en",
        temperature=0,
        extra_body={"max_completion_tokens": NEW_TOKENS},
    )
    return _sound(answer.text)


def _sound(text: str) -> str:
    """Bytes that are no text are shown as they come, alone or with their neighbours: leave them out."""
    return "".join(letter for letter in text if letter.isascii() and letter.isalnum())


def expected(world: World, label: str | None, audio: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model)
    tokens = list(world.oracle(audio).greedy(world.states[label], world.prompt, NEW_TOKENS))
    end = tokenizer.eos_token_id
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    return _sound(tokenizer.decode(tokens, skip_special_tokens=True))


def test_every_adapter_at_once_transcribes_as_its_merged_model(world: World, client: Client) -> None:
    asks = [(label, audio) for audio in (7, 8) for label in world.states]
    with ThreadPoolExecutor(len(asks)) as pool:
        texts = list(pool.map(lambda ask: transcribe(client, ask[0] or BASE, ask[1]), asks))
    wanted = [expected(world, label, audio) for label, audio in asks]
    assert texts == wanted
    assert len(set(wanted)) > len(wanted) * 0.8, "most should hear something of their own"


def test_names_are_listed_and_others_refused(world: World, client: Client) -> None:
    assert client.names() == {BASE} | {label for label in world.states if label is not None}
    with pytest.raises(openai.NotFoundError, match="nobody"):
        transcribe(client, "nobody", 7)
