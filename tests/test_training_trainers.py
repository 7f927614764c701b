"""FLoRA inside transformers' Trainer and TRL's SFTTrainer, unchanged, on a tiny model with a pattern to learn."""

import warnings

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from training_support import sentences, tiny_llama, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from flora_vllm.training import DEFAULT_LEARNING_RATE, FloraConfig, FloraLearningRateCallback

# Trainer, TRL and datasets warn about settings of their own that do not concern us.
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = {"target_modules": "all-linear", "r": 2, "task_type": "CAUSAL_LM"}


def arguments(tmp_path, cls=TrainingArguments, **fields):
    return cls(
        output_dir=str(tmp_path),
        max_steps=15,
        per_device_train_batch_size=8,
        learning_rate=DEFAULT_LEARNING_RATE,
        logging_steps=1,
        save_steps=15,
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **fields,
    )


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_transformers_trainer_learns_saves_and_the_checkpoint_loads(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": i, "labels": i} for i in tokenizer(sentences(32))["input_ids"]]
    model = get_peft_model(tiny_llama(), FloraConfig(**CONFIG))
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[FloraLearningRateCallback],
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    ids = torch.tensor([rows[0]["input_ids"]])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-15").eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_trl_sft_trainer_learns(tmp_path):
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        tiny_llama(),
        arguments(tmp_path, SFTConfig, max_length=32, bf16=False),
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in sentences(32)]),
        processing_class=tiny_tokenizer(),
        peft_config=FloraConfig(**CONFIG),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("rate", "warns"), [(2e-4, True), (DEFAULT_LEARNING_RATE, False)])
def test_callback_warns_about_a_lora_sized_rate(tmp_path, rate, warns):
    args = arguments(tmp_path)
    args.learning_rate = rate
    model = get_peft_model(tiny_llama(), FloraConfig(**CONFIG))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FloraLearningRateCallback().on_train_begin(args, None, None, model=model)
    assert [str(w.message).startswith("learning rate 0.0002 is sized for LoRA") for w in caught] == [True] * warns
