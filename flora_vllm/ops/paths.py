"""The names of the two exact ways, and of the choice between them; without torch, for those who only name them."""

from typing import Literal

PathChoice = Literal["auto", "stacked", "modulated"]
PATHS: tuple[PathChoice, ...] = ("auto", "stacked", "modulated")
