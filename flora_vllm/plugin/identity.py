"""An adapter's identity: its name and the digest of its content, `name@digest`. What the engine knows it by.

The whole SHA-256: a part of it could be made to fit other content, put in the place of what was reviewed.
"""

import re

DIGEST_LETTERS = 64
_IDENTITY = re.compile(rf"^(?P<name>.+)@(?P<digest>[0-9a-f]{{{DIGEST_LETTERS}}})$", re.DOTALL)


def identity(name: str, digest: str) -> str:
    """The name under which the engine knows this content. `digest`: all DIGEST_LETTERS hexadecimal digits."""
    assert len(digest) == DIGEST_LETTERS, f"a digest of {len(digest)} digits"
    return f"{name}@{digest}"


def split_identity(lora_name: str) -> tuple[str, str | None]:
    """(plain name, digest or None) of an engine-side adapter name."""
    match = _IDENTITY.match(lora_name)
    return (match["name"], match["digest"]) if match else (lora_name, None)


def plain_name(lora_name: str) -> str:
    """The name that clients use of an engine-side one."""
    return split_identity(lora_name)[0]
