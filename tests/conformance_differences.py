"""Where a LoRA user meets something else with `--enable-flora` than without: each intended difference, with its reason.

`test_conformance.py` and `make conformance` fail on a difference that is not here, and on one here that is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """(status, error type) of stock's answer and of ours."""

    stock: tuple[int, str | None]
    ours: tuple[int, str | None]
    reason: str


_SERVED = (200, None)
_BAD = (400, "BadRequestError")
_BROKEN = (500, "InternalServerError")

_CLIENTS_FAULT = "a faulty adapter is a fault of what the client sent, not the server's: a 4xx that names every fault"
_NAMES = (
    "names reach logs, metrics' labels and other clients, so an alphabet is the default; --flora-adapter-names allows "
    "others"
)

# Name of a case in conformance_calls.py -> what differs.
CALLS: Mapping[str, Difference] = {
    "path left out": Difference(
        (400, "Bad Request"), (400, "InvalidUserInput"), "lora_path may be left out where a mix takes its place"
    ),
    "name 'two words!' of 10": Difference(_SERVED, _BAD, _NAMES),
    "name 'Größe' of 5": Difference(_SERVED, _BAD, _NAMES),
    **dict.fromkeys(
        (
            "load broken-json",
            "load no-tensors",
            "load rank-1024",
            "load saved-head",
            "load saved-norm",
            "load truncated-tensors",
            "path of a file",
            "SageMaker load of broken files",
        ),
        Difference(_BROKEN, _BAD, _CLIENTS_FAULT),
    ),
    "load dora": Difference(_BROKEN, _BAD, "DoRA is served; this file says it is one and lacks its magnitudes"),
    "load pissa": Difference(_BROKEN, _SERVED, "PiSSA is served: the base's decomposition is made when it is loaded"),
    "load bias": Difference(_BROKEN, _SERVED, "biases of adapted layers are served; this file has none"),
    "load trained-on-another-model": Difference(
        _SERVED, _BAD, "stock drops tensors of modules that the model lacks, and serves what is left without a word"
    ),
    "load no-peft-type": Difference(_SERVED, _BAD, "an adapter's family is named, never guessed"),
}

# Test of vLLM's that passes on stock vLLM and not with the flag -> why.
_SERVER = "tests.entrypoints.serve.lora.test_lora_adapters::"
_GOES_ON = "test_loading_invalid_adapters_does_not_break_others"
_BAD_REQUEST = f"{_SERVER}test_dynamic_lora_badrequests"
UPSTREAM: Mapping[str, str] = {
    f"{_SERVER}test_dynamic_lora_invalid_files[True]": _CLIENTS_FAULT,
    f"{_SERVER}{_GOES_ON}[True]": _CLIENTS_FAULT,
    f"{_BAD_REQUEST}[True-test_rank-config_change0-is greater than max_lora_rank]": _CLIENTS_FAULT,
    f"{_BAD_REQUEST}[True-test_dora-config_change1-does not yet support DoRA]": "DoRA is served",
    f"{_BAD_REQUEST}[True-test_pissa-config_change2-init_lora_weights='pissa']": "PiSSA is served",
    f"{_BAD_REQUEST}[True-test_modules_to_save-config_change3-Unsupported modules_to_save]": CALLS[
        "load saved-head"
    ].reason,
    "tests.entrypoints.serve.sagemaker.test_sagemaker_lora_adapters::test_sagemaker_load_adapter_invalid_files": (
        _CLIENTS_FAULT
    ),
}
# Of those, not run with the flag: where it fails, it goes on asking a client that is closed until memory ends.
ENDLESS = (f"tests/entrypoints/serve/lora/test_lora_adapters.py::{_GOES_ON}",)
