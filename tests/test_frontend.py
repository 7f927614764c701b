"""Names, identities and error texts, without a server."""

import pytest

from flora_vllm.errors import adapter_error
from flora_vllm.plugin.identity import identity, plain_name, split_identity
from flora_vllm.plugin.refusals import our_message

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["poems", "team/poems", "a@b", f"odd@{DIGEST[:16]}", "multi\nline"])
def test_identity_and_plain_name(name: str) -> None:
    known = identity(name, DIGEST)
    assert split_identity(known) == (name, DIGEST[:16])
    assert plain_name(known) == name
    assert identity(name, "f" * 64) != known


def test_a_name_without_digest_is_itself() -> None:
    assert split_identity("poems") == ("poems", None)
    assert split_identity("poems@v2") == ("poems@v2", None)


def test_our_message_is_found_in_the_engines_text() -> None:
    """vLLM's worker, executor and core each wrap an error's text in their own."""
    text = str(adapter_error("'p' (dir)", ["first fault", "second fault: 'x'"]))
    wrapped = f"Call to add_lora method failed: Worker failed with error '{text}', please check the stack trace above"
    assert our_message(wrapped) == text
    assert our_message(text) == text


def test_other_errors_are_not_ours() -> None:
    assert our_message("CUDA out of memory") is None
