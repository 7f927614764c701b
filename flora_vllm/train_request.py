"""What `flora-vllm train` is asked for, by flags or in a jobs file; without torch, so that `--help` need not wait."""

from dataclasses import dataclass
from pathlib import Path

from flora_vllm.errors import ConfigError
from flora_vllm.options import check, number_above, number_between, one_of, option, text, whole

# Method -> its learning rate if none is given (FLoRA: the paper's; LoRA and IA3: the paper's for the same task).
RATES = {"flora": 8e-3, "lora": 2e-4, "ia3": 5e-3}


@dataclass(frozen=True)
class Request:
    """One adapter to train. base: model directory or hub id. data: file or directory. out: directory to write."""

    base: str
    data: Path
    out: Path
    method: str = option("flora", "--method", one_of(tuple(RATES)), "What is trained.")
    rank: int = option(1, "--rank", whole(1), "At 1 FLoRA is cheapest to serve.", metavar="R")
    targets: str | None = option(
        None,
        "--targets",
        text("module names with commas, a regex or all-linear"),
        "Module names with commas, a regex or all-linear (default: PEFT's choice for the architecture).",
    )
    steps: int | None = option(None, "--steps", whole(1), "Default: one epoch.", metavar="N")
    epochs: float | None = option(None, "--epochs", number_above(0), "Passes over the training blocks.", metavar="N")
    lr: float | None = option(
        None, "--lr", number_above(0), "Peak learning rate (default: the method's, see below).", metavar="RATE"
    )
    batch: int = option(4, "--batch", whole(1), "Blocks in a step.", metavar="N")
    length: int = option(256, "--length", whole(2), "Tokens in a block, or the most in a transcript.", metavar="N")
    held_out: float = option(
        0.05, "--held-out", number_between(0, 1), "Share of the text to measure with.", metavar="SHARE"
    )
    save_every: int = option(50, "--save-every", whole(1), "Steps between checkpoints.", metavar="STEPS")
    seed: int = option(
        0, "--seed", whole(0, most=2**32 - 1), "Of the initial factors and the order of the data.", metavar="N"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("steps and epochs say the same thing; leave one out")

    @property
    def rate(self) -> float:
        return self.lr or RATES[self.method]
