"""The operator's list of the only adapters that may be loaded, by the digest of their content."""

import logging
from pathlib import Path

from flora_vllm.errors import adapter_error
from flora_vllm.formats.limits import brief

logger = logging.getLogger(__name__)


def check_digest(list_file: str | None, name: str, digest: str) -> None:
    """Raises AdapterError if there is a list and no line of it begins with `digest`.

    The file is read each time: what is taken off it is not loaded again. What is loaded already stays.
    """
    if list_file is None:
        return
    try:
        lines = Path(list_file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        logger.error("adapter_digests (--flora-adapter-digests) cannot be read: %s", error)
        raise adapter_error(brief(name), ["the operator's list of digests cannot be read"]) from None
    if digest not in {line.split(maxsplit=1)[0].lower() for line in lines if line.strip()}:
        raise adapter_error(brief(name), [f"its digest {digest} is not on the operator's list"])
