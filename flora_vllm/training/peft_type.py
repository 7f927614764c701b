"""Makes PEFT know the name FLORA.

PEFT 0.21 lets outside code register a method (`register_peft_method`), but only under a name that is a member of its
`PeftType` enum, and an enum with members can't be subclassed. The member is added by hand; the day PEFT ships its own
FLORA this module stops with PEFT's message instead of shadowing it.
"""

from peft.utils import PeftType, register_peft_method

NAME = "flora"
PREFIX = "flora_"


def add_peft_type() -> PeftType:
    """The member `PeftType.FLORA`, added if it is not there."""
    value = NAME.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    # EnumType.__setattr__ guards members only; attribute access needs the class attribute from Python 3.12 on.
    PeftType._member_map_[value] = member
    PeftType._member_names_.append(value)
    PeftType._value2member_map_[value] = member
    if value not in PeftType.__dict__:
        type.__setattr__(PeftType, value, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register FLoRA with PEFT; a second call with the same classes does nothing.

    Raises KeyError (PEFT's) if another class already holds the name.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if PEFT_TYPE_TO_TUNER_MAPPING.get(add_peft_type()) is model_cls:
        return
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
