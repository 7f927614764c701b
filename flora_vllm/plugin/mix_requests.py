"""Mixes in the server's requests: `extra_body={"flora": {"mix": {...}}}`, and `"mix"`, `"arrow"` where one is loaded.

A mix that a request asks for is loaded like a named one, under its own text (`mix:a*0.7+b*0.3`), and the request then
names it; so everything behind sees an adapter like any other. So is the mix that a chooser makes for a prompt; its
answer has the chooser's name. The least recently asked for is unloaded. HEADER of the answer has the weights.
"""

import functools
import importlib
import json
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats.limits import shown
from flora_vllm.plugin import choosers, frontend, guard, mixes
from flora_vllm.plugin.access import CURRENT, OPERATOR, ScopedRequests
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.lasting import to_its_end
from flora_vllm.plugin.lent import LENT
from flora_vllm.plugin.mix_paths import ARROW_PREFIX, PREFIX
from flora_vllm.plugin.options import options_of
from flora_vllm.plugin.told import tell

KEY, HEADER = "flora", "x-flora-mix"
MOST_UNNAMED = 64
_BASE = "vllm.entrypoints.serve.engine.serving"
_CHOOSES = f"{_BASE}:BaseServing.before_check_model"  # patches/0019
_LOADS_MIXES = "vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest.arrow"  # patches/0020


def install() -> None:
    """Once, for a server with FLoRA."""
    base: Any = importlib.import_module(_BASE).BaseServing
    pooling: Any = importlib.import_module("vllm.entrypoints.pooling.base.serving").PoolingBaseServing
    if offers(_CHOOSES):
        base.before_check_model = staticmethod(choose)
    else:
        _choose_before(base, raises=False)
        _choose_before(pooling, raises=True)
    if not offers(_LOADS_MIXES):
        _load_mixes()


def _choose_before(serving: Any, *, raises: bool) -> None:
    original = serving._check_model

    @functools.wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        refused = await choose(self, request)
        if refused is None:
            return await original(self, request)
        if raises:
            raise ValueError(refused.error.message)
        return refused

    serving._check_model = check_model


def _load_mixes() -> None:
    """The body of /v1/load_lora_adapter takes `mix` in place of `lora_path`, with a merge's method, or `arrow`."""
    router: Any = importlib.import_module("vllm.entrypoints.serve.lora.api_router")
    pydantic = importlib.import_module("pydantic")

    class LoadLoRAAdapterRequest(router.LoadLoRAAdapterRequest):
        lora_path: str = ""
        mix: dict[str, float] | None = None
        method: str | None = None
        density: float | None = None
        majority_sign_method: str | None = None
        seed: int | None = None
        arrow: dict[str, Any] | None = None

        @pydantic.model_validator(mode="after")
        def name_the_mix(self) -> Any:
            names = ("method", "density", "majority_sign_method", "seed")
            options = {name: value for name in names if (value := getattr(self, name)) is not None}
            if options and (self.mix is None or self.method is None):
                raise ValueError(f"{', '.join(options)} go with a mix and its method")
            given = {"lora_path": self.lora_path or None, "mix": self.mix, "arrow": self.arrow}
            if len(beside := [name for name, value in given.items() if value is not None]) > 1:
                raise ValueError(f"give {' or '.join(beside)}, not both")
            if self.mix is not None:
                self.lora_path = PREFIX + json.dumps({"mix": self.mix, **options} if options else self.mix)
            if self.arrow is not None:
                self.lora_path = ARROW_PREFIX + json.dumps(self.arrow)
            return self

    router.LoadLoRAAdapterRequest = LoadLoRAAdapterRequest


async def choose(serving: Any, request: Any) -> Any:
    """Have a request with a mix, or one for a chooser, name its mix as its model; an error response if it cannot."""
    extra = getattr(request, "model_extra", None) or {}
    if not hasattr(serving.models, "engine_client"):  # it only renders prompts, and knows no adapters
        return _error(f'this server has no engine, so none for "{KEY}"; leave it out here') if KEY in extra else None
    if KEY not in extra and not choosers.choosers_of(serving.models):
        return None
    if options_of(serving.models.engine_client.vllm_config.additional_config) is None:
        return None
    if KEY not in extra:
        chooser = choosers.named(serving.models, request.model)
        return None if chooser is None else await _choose_by_prompt(serving.models, chooser, request)
    asked = extra[KEY]
    if not isinstance(asked, Mapping) or set(asked) != {"mix"}:
        return _error(f'"{KEY}" must be an object with the one key "mix", got {shown(asked)}')
    if not serving._is_model_supported(request.model):
        return _error(f"a request with a mix names the base model, not {request.model!r}; its parts are in the mix")
    try:
        name = mixes.text_of(mixes.checked(asked["mix"]))
    except AdapterError as error:
        return _error(str(error))
    return await _give(serving.models, request, asked["mix"], name, PREFIX + json.dumps(dict(asked["mix"])), None)


async def _choose_by_prompt(models: Any, named: choosers.Named, request: Any) -> Any:
    try:
        prompt = choosers.prompt_of(request)
        mix = await choosers.choice_of(named.chooser, prompt)
    except AdapterError as error:
        return _error(f"{named.name!r}: {error}")
    weights, key = choosers.weights_of(mix), choosers.key_of(named.name, mix)
    return await _give(models, request, weights, key, mix, named.name)


async def _give(
    models: Any, request: Any, weights: Mapping[str, float], name: str, content: str | mixes.Mix, told: str | None
) -> Any:
    """The request names the mix, which is loaded; None, or an error response."""
    known = await to_its_end(models, _loaded(models, request, name, content, told, weights))
    if not isinstance(known, str):
        return guard.presentable(known, None)  # parts have paths, which this client may never have sent
    request.model = name
    tell(HEADER, json.dumps(dict(weights)))
    return None


async def _loaded(
    models: Any, request: Any, name: str, content: str | mixes.Mix, told: str | None, parts: Iterable[str]
) -> Any:
    """The identity of the mix, loaded under `name` for as long as `request` may ask with it, or an error response."""
    table = models.lora_requests
    async with models.lora_resolver_lock[name]:
        # Before they are looked up, for they may lose their names meanwhile.
        mixed_of = table.parts_of(parts) if isinstance(table, ScopedRequests) and told is None else None
        known = await frontend.admit(models, name, content, told=told, by_request=True)
    if isinstance(known, str):
        if mixed_of is not None:
            table.open_by_parts(name, mixed_of)
        recent: OrderedDict[str, None] = models.__dict__.setdefault("_flora_mixes", OrderedDict())
        recent[name] = None
        recent.move_to_end(name)
        # The oldest may be another tenant's.
        token = CURRENT.set(OPERATOR)
        try:
            if name in table:
                # Its media may be fetched for long before it is looked up; then the handler has a loan of its own.
                weakref.finalize(request, _end_loan, LENT.lend(table[name])).atexit = False
            while old := outdated(recent, _lent_names(table)):
                oldest = old[0]
                del recent[oldest]
                if oldest in table:
                    await frontend.release(models, table.pop(oldest))
        finally:
            CURRENT.reset(token)
    return known


def _end_loan(_lent: Any) -> None:
    """Nothing refers to it any more."""


def _lent_names(table: Mapping[str, Any]) -> set[str]:
    """Those in the table of adapters that a request may still ask with."""
    lent = {request.lora_name for request in LENT.requests()}
    return {name for name, request in table.items() if request.lora_name in lent}


def outdated(recent: Iterable[str], lent: Collection[str]) -> list[str]:
    """Those beyond the MOST_UNNAMED asked for last that nobody may still ask with. `recent`: the oldest first."""
    names = list(recent)
    return [name for name in names[: max(len(names) - MOST_UNNAMED, 0)] if name not in lent]


def _error(message: str) -> Any:
    return frontend.error_response(message, HTTPStatus.BAD_REQUEST)
