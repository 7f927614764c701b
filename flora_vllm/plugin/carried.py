"""How the plugin's options reach every process of an engine.

vLLM only logs a plugin that fails to import and would then serve without us; therefore the options travel as
`CarriedOptions`, whose unpickling installs the worker side or fails: a process without a working plugin cannot even
read its config.
"""

from dataclasses import asdict
from typing import Any

from flora_vllm.plugin import install
from flora_vllm.plugin.options import FloraOptions


class CarriedOptions(dict):
    """A plain dict of options whose unpickling in another process installs the worker side there, or raises."""

    def __reduce__(self) -> tuple:
        return _arrive, (dict(self),)


def _arrive(values: dict[str, Any]) -> CarriedOptions:
    install.install_worker_side()
    return CarriedOptions(values)


def carried(options: FloraOptions) -> CarriedOptions:
    return CarriedOptions(asdict(options))
