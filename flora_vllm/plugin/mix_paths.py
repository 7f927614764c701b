"""What stands for an adapter's path where it is none: a mix (mixes.py), or a folder with a classifier."""

import json

PREFIX, ARROW_PREFIX = "mix:", "arrow:"
ENCODED = f"{PREFIX}[["  # what `mixes.encoded` writes begins so
CHOOSER_PREFIX = "dlp:"  # what is at such a path is no adapter: choosers.py


def paths_in(path: str) -> list[str] | None:
    """The paths of the parts of a mix that `mixes.encoded` wrote; None: it is a path. Needs no torch, as mixes does."""
    if not path.startswith(ENCODED):
        return None
    return [part[2] for part in json.loads(path.removeprefix(PREFIX)) if isinstance(part, list)]
