"""DLP-LoRA in the server: a folder is loaded under a name, and each request that names it gets the mix of its prompt.

`--lora-modules tasks=dlp:DIR`, or `dlp:DIR` as the path of a load; then `model="tasks"` or `"dlp:tasks"`. The engine
never hears of the folder, only of the mixes: what is in the table of adapters under its name is no adapter.
"""

import asyncio
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats.dlp import Choice, Chooser
from flora_vllm.plugin.access import CHOICE
from flora_vllm.plugin.identity import identity, plain_name
from flora_vllm.plugin.mix_paths import CHOOSER_PREFIX, PREFIX
from flora_vllm.plugin.mixes import Mix, Part, text_of

# Each keeps its classifier in every server process.
MOST_CHOOSERS = 16
# Prompts that are read at a time: others wait here, and not before what loads adapters.
_THREADS = 2


def is_chooser(path: str) -> bool:
    return path.startswith(CHOOSER_PREFIX)


@dataclass(frozen=True)
class Named:
    """A chooser and the name that it was loaded under."""

    name: str
    chooser: Chooser


def choosers_of(models: Any) -> dict[str, Chooser]:
    """Identity -> chooser, of all that are loaded."""
    return models.__dict__.setdefault("_flora_choosers", {})


def check_room(models: Any, name: str) -> None:
    """Whether one more can be loaded, as `name`. Raises AdapterError."""
    others = [known for known in choosers_of(models) if plain_name(known) != name]
    if len(others) >= MOST_CHOOSERS:
        raise AdapterError(
            f"{name!r}: {len(others)} folders with a classifier are loaded, a server keeps at most {MOST_CHOOSERS}; "
            "unload one"
        )


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "flora-choosers")


async def choice_of(chooser: Chooser, prompt: str) -> Mix:
    """What the classifier chooses for this prompt. Raises AdapterError."""
    found = await asyncio.get_running_loop().run_in_executor(_threads(), chooser.choose, prompt)
    return mix_of_choice(found)


def named(models: Any, model: str | None) -> Named | None:
    """The chooser that a request's `model` names, of those that the present tenant may use."""
    for name in (model, model.removeprefix(CHOOSER_PREFIX)) if model else ():
        request = models.lora_requests.get(name)
        if request is not None:
            chooser = choosers_of(models).get(request.lora_name)
            return None if chooser is None else Named(name, chooser)
    return None


def mix_of_choice(found: Sequence[tuple[Choice, float]]) -> Mix:
    return Mix(tuple(_part(choice, weight) for choice, weight in found))


def _part(choice: Choice, weight: float) -> Part:
    """Each adapter's own scale is in its terms: what is left of the first one's is in the weight."""
    return Part(weight * choice.share, identity(choice.name, choice.digest), choice.path)


def key_of(name: str, mix: Mix) -> str:
    """Under which name a choice of the chooser `name` is loaded: no client can give an adapter such a name."""
    return f"{name}{CHOICE}{text_of(weights_of(mix)).removeprefix(PREFIX)}"


def is_choice_of(key: str, name: str) -> bool:
    return key.startswith(f"{name}{CHOICE}")


def trials(chooser: Chooser) -> Iterator[Mix]:
    """Mixes with each adapter in one, and with the largest ranks that a prompt can bring together: what the engine
    takes of these, at the largest weights, it takes of every choice."""
    ordered = sorted(chooser.choices, key=lambda choice: -choice.rank)
    for start in range(0, len(ordered), chooser.most):
        yield mix_of_choice([(choice, 1.0) for choice in ordered[start : start + chooser.most]])


def weights_of(mix: Mix) -> dict[str, float]:
    """Adapter -> weight, as the client is told it."""
    return {plain_name(part.name): part.weight for part in mix.parts}


def prompt_of(request: Any) -> str:
    """The text to choose by: the prompt or input, of a chat the last message of the user's. Raises AdapterError."""
    given = next((value for key in ("messages", "prompt", "input") if (value := getattr(request, key, None))), None)
    if isinstance(given, list):
        asked = [message for message in given if _field(message, "role") == "user"]
        given = _text_of(_field(asked[-1], "content")) if asked else given[0] if len(given) == 1 else None
    if not isinstance(given, str):
        raise AdapterError(
            "adapters are chosen by a prompt's text: give one prompt as text, or a chat with text of the user's"
        )
    return given


def _text_of(content: Any) -> str | None:
    """Of a message's content: text, or a list of parts."""
    if not isinstance(content, list):
        return content
    texts = [_field(part, "text") for part in content]
    return "\n".join(text for text in texts if isinstance(text, str)) or None


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
