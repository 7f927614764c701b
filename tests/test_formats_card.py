"""The card of a FLoRA adapter says how to load and serve it, whoever writes it, once, and keeps what a user wrote."""

from pathlib import Path

import pytest
import torch
from formats_support import tiny_model
from peft import get_peft_model

from flora_vllm.formats import examine, write_flora
from flora_vllm.formats.card import HEADING, card_for
from flora_vllm.training import FloraConfig


def told(path: Path) -> str:
    text = (path / "README.md").read_text()
    assert text.count(HEADING) == 1
    assert "import flora_vllm.training" in text
    return text


def test_write_flora_says_it_and_keeps_a_users_text(tmp_path: Path) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(20, 64), torch.ones(64, 20))}
    path = write_flora(tmp_path / "a", factors, base_model="hub/base")
    assert "vllm serve hub/base --enable-flora --max-flora-rank 20 --lora-modules" in told(path)
    (path / "README.md").write_text("Mine.\n")
    write_flora(path, factors)
    assert told(path).startswith("Mine.\n\n## FLoRA")
    assert card_for(path, None, 20).decode() == told(path), "what is there stays as it is"
    assert not examine(path).faults


def test_a_card_follows_the_adapter_that_replaces_its_own(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(card_for(tmp_path, "hub/old", 20))
    assert card_for(tmp_path, r"C:\new", 1) == card_for(tmp_path / "fresh", r"C:\new", 1)
    card.write_bytes(card.read_bytes() + b"\nMine, caf\xe9.\n")
    card.write_bytes(card_for(tmp_path, "hub/new", 1))
    assert b"old" not in card.read_bytes()
    assert b"base_model: hub/new\n" in card.read_bytes()
    assert b"vllm serve hub/new --enable-flora --lora-modules" in card.read_bytes()
    assert card.read_bytes().endswith(b"\nMine, caf\xe9.\n")
    card.write_bytes(card.read_bytes().replace(b"gives wrong answers", b"is wrong"))
    section = card.read_bytes().partition(HEADING.encode())[2]
    assert card_for(tmp_path, "hub/newest", 1).endswith(section), "what somebody changed in ours stays"


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_pefts_own_saving_says_it_beside_pefts_card(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), FloraConfig(r=2, target_modules=["q_proj"]))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = told(tmp_path)
    assert text.startswith("---\n")
    assert "PEFT" in text.split(HEADING)[0], "PEFT's card is there"
