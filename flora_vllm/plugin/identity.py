"""An adapter's identity: its name and the digest of its content, `name@digest`. What the engine knows it by."""

import re

DIGEST_LETTERS = 16
_IDENTITY = re.compile(rf"^(?P<name>.+)@(?P<digest>[0-9a-f]{{{DIGEST_LETTERS}}})$", re.DOTALL)


def identity(name: str, digest: str) -> str:
    """The name under which the engine knows this content."""
    return f"{name}@{digest[:DIGEST_LETTERS]}"


def split_identity(lora_name: str) -> tuple[str, str | None]:
    """(plain name, digest or None) of an engine-side adapter name."""
    match = _IDENTITY.match(lora_name)
    return (match["name"], match["digest"]) if match else (lora_name, None)


def plain_name(lora_name: str) -> str:
    """The name that clients use of an engine-side one."""
    return split_identity(lora_name)[0]
