"""A server that is started again serves without the adapters that cannot be loaded again, in place of not at all.

One that a person starts ends with the reason if an adapter of its command line has a fault. After a restart the command
line is what the last server had: others' adapters too, which may have been replaced or broken since. What a request
loaded is read as strictly as the first time: whoever may write below the adapter root has had time to put a link there.
"""

import functools
import importlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_vllm.plugin.access import CURRENT, OPERATOR, Tenant, read_tenants
from flora_vllm.plugin.mix_paths import CHOOSER_PREFIX

logger = logging.getLogger(__name__)

# A supervisor's word to its server: name -> `place_of` the adapters of the operator's own command, as JSON.
RESTARTED = "FLORA_RESTARTED"


def place_of(path: str) -> str:
    """The directory that an adapter's path says, as vLLM makes it absolute; what is no path is as good as any."""
    return os.path.abspath(os.path.expanduser(path.removeprefix(CHOOSER_PREFIX)))  # noqa: PTH100, PTH111 - links stay


def install() -> None:
    """Replaces the loading of the command line's adapters; inert without FLoRA and for a first start."""
    from flora_vllm.plugin.options import options_of_engine  # here: the supervisor imports this file

    serving: Any = importlib.import_module("vllm.entrypoints.openai.models.serving").OpenAIServingModels
    load_all = serving.init_static_loras

    @functools.wraps(load_all)
    async def load_each(self: Any) -> None:
        options = options_of_engine(self.engine_client)
        if RESTARTED not in os.environ or options is None:
            await load_all(self)
            return
        own = json.loads(os.environ[RESTARTED])
        kept = []
        for module in self.static_lora_modules or ():
            reader = _reader(options, own, module)
            self.static_lora_modules = [module]
            token = CURRENT.set(reader)
            try:
                await load_all(self)
                # Of those that are the operator's the path is not confined if a request names it again.
                kept += [module] if reader is OPERATOR else []
            except ValueError as error:
                logger.error("adapter %r cannot be loaded again; serving without it: %s", module.name, error)
            finally:
                CURRENT.reset(token)
        self.static_lora_modules = kept

    serving.init_static_loras = load_each


def _reader(options: Any, own: Mapping[str, str], module: Any) -> Tenant:
    """As whom an adapter is loaded again: the operator, or somebody confined to where whoever loaded it was.

    What a request loads lies below the adapter root, and a tenant's below its directory. Which of those that may write
    there it was nobody remembers: the innermost directory holds for all.
    """
    place = place_of(module.path)
    if options.adapter_root is None or own.get(module.name) == place or not _is_below(place, options.adapter_root):
        return OPERATOR
    tenants = {} if options.adapter_acl is None else read_tenants(options.adapter_acl, has_root=True)
    directories = {tenant.directory for tenant in tenants.values() if tenant.may_load}
    around = [name for name in directories if name and _is_below(place, Path(options.adapter_root, name))]
    return Tenant("restarted", directory=max(around, key=len, default=""))


def _is_below(place: str, root: str | Path) -> bool:
    return Path(place).is_relative_to(os.path.realpath(root))
