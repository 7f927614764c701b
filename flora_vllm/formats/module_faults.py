"""Faults of a checkpoint's modules: partners, shapes and dtypes, what the config selects, what the base model has."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from flora_vllm.adapter import ModelLayout
from flora_vllm.formats.base_model import EMBEDDINGS
from flora_vllm.formats.config_keys import CheckedConfig
from flora_vllm.formats.families.family import FLOATS, Family, Part, Scope
from flora_vllm.formats.limits import shown
from flora_vllm.formats.matching import OUTPUT_LAYERS, Targets
from flora_vllm.formats.names import PREFIX, ROOT, part_of
from flora_vllm.formats.patterns import full_match
from flora_vllm.formats.tensor_file import TensorRecord, tensor_view
from flora_vllm.pacing import pace

# Last part of a module path -> why it cannot be adapted, whatever the base model.
UNSUPPORTED_MODULES: Mapping[str, str] = {
    **dict.fromkeys(("lm_head", "embed_out"), "this model has no output layer of its own that adapters may change"),
    **dict.fromkeys((*sorted(EMBEDDINGS), "wpe"), "this embedding cannot be adapted"),
}
# Names that a checkpoint's modules may have in place of the layout's, in front of what they share with it.
MAX_PREFIXES = 64
_NUMBER = "#"  # in such a prefix: any, the same in both
_MEANINGS = {"R": "rank", "I": "in features", "O": "out features"}
_UNSELECTING_KEYS = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
)

Records = Mapping[str, TensorRecord]


def value_faults(data: bytearray, records: Sequence[TensorRecord]) -> Iterator[str]:
    """NaN and Inf, wherever they are."""
    for run in _runs(records):
        if _is_finite(tensor_view(data, _span(run))):
            continue
        for record in run:
            tensor = tensor_view(data, record)
            if tensor.numel() and not _is_finite(tensor):
                bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                yield f"tensor {record.name!r} has {bad} NaN or Inf of {tensor.numel()} values; retrain or repair it"


def _runs(records: Sequence[TensorRecord]) -> Iterator[list[TensorRecord]]:
    """Runs of floating-point tensors of one dtype; a file's tensors follow each other without gaps."""
    run: list[TensorRecord] = []
    for record in records:
        if run and record.dtype != run[0].dtype:
            yield run
            run = []
        if record.dtype in FLOATS and 0 not in record.shape:
            run.append(record)
    if run:
        yield run


def _span(run: Sequence[TensorRecord]) -> TensorRecord:
    start, end = run[0].start, run[-1].end
    item = (run[0].end - run[0].start) // max(torch.Size(run[0].shape).numel(), 1)
    return TensorRecord("", run[0].dtype, ((end - start) // item,), start, end)


def _is_finite(tensor: torch.Tensor) -> bool:
    # Minimum and maximum carry NaN and Inf along, and cost a twentieth of isfinite on bfloat16.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def module_faults(
    family: Family, config: CheckedConfig, modules: Mapping[str, Records], layout: ModelLayout | None
) -> Iterator[str]:
    """Faults of every module, and of the modules as a whole."""
    selects = "target_modules" in family.keys and not config.bad & _UNSELECTING_KEYS
    targets = Targets.from_config(config.values) if selects and config.values.get("target_modules") else None
    for module, parts in sorted(modules.items()):
        pace()
        yield from _one_module_faults(family, config, module, parts, layout)
        is_tied = set(parts) <= family.of_heads and not is_embedding(module, layout)
        if targets is not None and not (is_tied or set(parts) <= family.alone or targets.select(module)):
            yield (
                f"module {module!r} has tensors but the config does not select it "
                f"(target_modules {shown(config.values['target_modules'])}); PEFT would not apply them: "
                "correct target_modules, exclude_modules, modules_to_save or layers_to_transform, or remove the tensors"
            )
    if layout is not None:
        all_are = family.implied(config.values)
        adapted = sorted(module for module, parts in modules.items() if all_are or not set(parts) <= family.alone)
        yield from _layout_faults(adapted, targets, layout, family.of_norms)


def shared_faults(family: Family, config: CheckedConfig, records: Records) -> Iterator[str]:
    """Faults of the tensors that the whole adapter has once."""
    if config.bad:
        return
    parts = family.shared_parts(config.values)
    for name, part in parts.items():
        if not part.optional and not any(part_of({name: part}, present) for present in records):
            yield f"tensor '{ROOT}{name}' is missing; the file is incomplete"
    for name, record in records.items():
        known = part_of(parts, name)
        if known is None:
            yield f"tensor {record.name!r} has no place in an adapter with this config; correct the config or remove it"
        else:
            yield from tensor_faults(record, parts[known], (), {})


def _one_module_faults(
    family: Family, config: CheckedConfig, module: str, records: Records, layout: ModelLayout | None
) -> Iterator[str]:
    reason = refusal(module, layout)
    if reason is not None:
        yield f"module {module!r} cannot be adapted: {reason}; train without it"
        return
    if (fault := _embedding_fault(family, module, records, layout)) is not None:
        yield fault
        return
    shape = None if layout is None else layout.shape_of(module)
    if layout is not None and shape is None:
        yield f"module {module!r} is not in the base model; was the adapter trained on another model?"
    if layout is not None and shape is not None and (layout.rename(module) in layout.norms) != family.of_norms:
        what = (
            "is no norm, and LN tuning is for these" if family.of_norms else "is a norm, which LN tuning alone adapts"
        )
        yield f"module {module!r} {what}; it has {', '.join(sorted(records))}; train without it"
        return
    if config.bad & set(_needed_keys(family)):
        return
    scope = scope_of(config.values, module, shape, records)
    parts = family.parts(scope)
    if not set(records) <= family.alone:
        for name, part in parts.items():
            if not part.optional and not any(part_of({name: part}, present) for present in records):
                yield f"tensor '{PREFIX}{module}.{name}' is missing, its partner {', '.join(records)} is there"
    ranks = () if config.bad & {"r", "rank_pattern"} else family.ranks(scope)
    sizes = {} if shape is None else dict(zip("OI", shape, strict=True))
    placed: list[tuple[TensorRecord, Part]] = []
    for name, record in records.items():
        known = part_of(parts, name)
        if known is None:
            yield f"tensor {record.name!r} has no place in a module with this config; correct the config or remove it"
            continue
        placed.append((record, parts[known]))
        yield from tensor_faults(record, parts[known], ranks, sizes)
    yield from _disagreements(placed, sizes)


def is_embedding(module: str, layout: ModelLayout | None) -> bool:
    return module.split(".")[-1] in EMBEDDINGS if layout is None else layout.rename(module) in layout.embeddings


def _embedding_fault(family: Family, module: str, records: Records, layout: ModelLayout | None) -> str | None:
    """Why these tensors are not those of such a module, an embedding or not."""
    if is_embedding(module, layout):
        if not set(records) & set(family.of_embeddings):
            return (
                f"module {module!r} is an embedding, which only LoRA and DoRA (lora_embedding_A, lora_embedding_B) and "
                f"trainable tokens adapt; it has those of {family.name}: {', '.join(sorted(records))}; train without it"
            )
    elif given := sorted(set(records) & set(family.of_embeddings) - _of_head(family, module)):
        return f"module {module!r} has the tensors of an embedding, {', '.join(given)}, and is none"
    return None


def _of_head(family: Family, module: str) -> frozenset[str]:
    return family.of_heads if module.rpartition(".")[2] in OUTPUT_LAYERS else frozenset()


def _disagreements(placed: Sequence[tuple[TensorRecord, Part]], sizes: Mapping[str, int]) -> Iterator[str]:
    """Two tensors of a module that disagree about a length which nothing else settles."""
    found: dict[str, list[tuple[TensorRecord, int]]] = {}
    for record, part in placed:
        if part.axes is not None and len(record.shape) == len(part.axes):
            for axis, size in zip(part.axes, record.shape, strict=True):
                if isinstance(axis, str) and axis not in sizes:
                    found.setdefault(axis, []).append((record, size))
    for axis, lengths in found.items():
        if len({size for _, size in lengths}) > 1:
            meaning = _MEANINGS.get(axis, axis)
            names = ", ".join(f"{record.name!r} has {meaning} {size}" for record, size in lengths)
            yield f"the tensors of one module disagree: {names}"


def _needed_keys(family: Family) -> Iterator[str]:
    """Keys whose values the row's functions look at; they are not called without them."""
    return (name for name, key in family.keys.items() if key.required and name != "target_modules")


def scope_of(
    config: Mapping[str, object],
    module: str,
    shape: tuple[int, int] | None,
    records: Records,
    task: str | None = None,
) -> Scope:
    out_features, in_features = shape or (None, None)
    return Scope(config, module, out_features, in_features, frozenset(records), task)


def selected_modules(config: CheckedConfig, layout: ModelLayout) -> list[str]:
    """The modules of the model that the config selects and that can be adapted.

    Experts are not among them: transformers holds them as parameters, which PEFT selects by other keys.
    """
    targets = Targets.from_config(config.values)
    linear = (path for path in layout.shapes.keys() - layout.embeddings - layout.norms if not layout.is_of_expert(path))
    return sorted(path for path in linear if refusal(path, layout) is None and targets.select(path))


def tensor_faults(record: TensorRecord, part: Part, ranks: tuple[int, ...], sizes: Mapping[str, int]) -> Iterator[str]:
    """The tensor's dtype and shape against its part: `sizes` are O and I of the base layer if known."""
    if record.dtype not in part.dtypes:
        yield (
            f"tensor {record.name!r} has dtype {record.dtype}; allowed: {', '.join(part.dtypes)}; "
            "convert it, for example to float32"
        )
    if 0 in record.shape and not part.may_be_empty:
        yield f"tensor {record.name!r} has shape {record.shape}, which is empty; it was not saved completely"
        return
    if part.axes is None:
        return
    allowed = [_allowed(axis, ranks, sizes) for axis in part.axes]
    fits = len(record.shape) == len(part.axes) and all(
        known is None or size in known for size, known in zip(record.shape, allowed, strict=True)
    )
    if not fits:
        wanted = ", ".join(_axis_text(axis, known) for axis, known in zip(part.axes, allowed, strict=True))
        yield (
            f"tensor {record.name!r} has shape {record.shape}; the config and the base model allow ({wanted}); "
            "correct the config, or the adapter was trained on another model"
        )


def _allowed(axis: str | int | None, ranks: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    if isinstance(axis, int):
        return (axis,)
    if axis == "R":
        return ranks or None
    return (sizes[axis],) if axis is not None and axis in sizes else None


def _axis_text(axis: str | int | None, known: tuple[int, ...] | None) -> str:
    if isinstance(axis, int):
        return str(axis)
    meaning = "any" if axis is None else _MEANINGS.get(axis, axis)
    return meaning if known is None else f"{' or '.join(map(str, sorted(set(known))))} ({meaning})"


def refusal(module: str, layout: ModelLayout | None) -> str | None:
    """Why `module` cannot be adapted, None if it can as far as its name tells."""
    names = module.split(".")
    if layout is not None:
        path = layout.rename(module)
        # Of experts that cannot be adapted the layout knows the path alone.
        for key in (path, names[-1], path.rsplit(".", 2)[0]):
            if key in layout.refused:
                return layout.refused[key]
        if layout.shape_of(module) is not None:
            return None
    elif names[-1] in OUTPUT_LAYERS or is_embedding(module, None):
        return None
    return next((UNSUPPORTED_MODULES[name] for name in reversed(names) if name in UNSUPPORTED_MODULES), None)


def _layout_faults(
    modules: Sequence[str], targets: Targets | None, layout: ModelLayout, of_norms: bool
) -> Iterator[str]:
    """Faults of the modules as a whole against the model's: named twice, or selected and absent."""
    present: dict[str, str] = {}
    for module in modules:
        other = present.setdefault(layout.rename(module), module)
        if other != module:
            yield f"modules {other!r} and {module!r} are one module of the base model; keep the tensors of one"
    if targets is None:
        return
    prefixes = sorted({_renamed_prefix(module, layout) for module in modules}, key=lambda pair: (*map(len, pair),))
    if len(prefixes) > MAX_PREFIXES:
        yield f"the modules' names begin in {len(prefixes)} ways; at most {MAX_PREFIXES} are read"
        return
    has_experts = any(layout.is_of_expert(path) for path in present)
    for path in layout.shapes:
        pace()
        # Where experts are no modules but parameters, nothing selects them here.
        if not has_experts and layout.is_of_expert(path):
            continue
        if (path in layout.norms) != of_norms or (path in layout.embeddings and targets.is_all_linear):
            continue
        if path in present:
            continue
        name = _called(path, prefixes)
        if refusal(name, layout) is None and targets.select(name):
            yield f"module {name!r} is selected by target_modules but has no tensors; the file is incomplete"


def _renamed_prefix(module: str, layout: ModelLayout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layout's and the checkpoint's prefix of `module`, up to where their names agree; both empty if equal.

    Numbers that are the same in both are any: deep models have as many layers as they like.
    """
    theirs, ours = module.split("."), layout.rename(module).split(".")
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs.pop()
        ours.pop()
    if list(filter(str.isdecimal, ours)) == list(filter(str.isdecimal, theirs)):
        ours, theirs = ([_NUMBER if name.isdecimal() else name for name in names] for names in (ours, theirs))
    return tuple(ours), tuple(theirs)


def _called(path: str, prefixes: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> str:
    """What a checkpoint would call the layout's path: with the longest prefix that its own modules have."""
    names = path.split(".")
    for ours, theirs in reversed(prefixes):
        head, rest = names[: len(ours)], names[len(ours) :]
        fits = (own == name or (own == _NUMBER and name.isdecimal()) for own, name in zip(ours, head, strict=False))
        if len(head) == len(ours) and all(fits):
            numbers = filter(str.isdecimal, head)
            return ".".join([*(next(numbers) if name == _NUMBER else name for name in theirs), *rest])
    return path


# What PEFT adds to the `modules_to_save` of a classifier by itself, whichever of them the model has.
_OF_CLASSIFIERS = ("classifier", "score")


def unsaved_faults(config: CheckedConfig, saved: Collection[str], layout: ModelLayout | None) -> list[str]:
    """The modules of the base that `modules_to_save` names and the file lacks: PEFT cannot load such a file either.

    `saved`: names of what it holds whole.
    """
    if layout is None or "modules_to_save" in config.bad:
        return []
    found = {name.removesuffix(".weight") for name in saved if name.endswith(".weight")}  # a bias alone is none
    missing = [
        entry
        for entry in config.values.get("modules_to_save") or ()
        if entry not in _OF_CLASSIFIERS
        and any(f".{path}".endswith(f".{entry}") for path in layout.shapes)
        and not any(entry in path for path in found)
    ]
    if not missing:
        return []
    return [
        f"modules_to_save names {shown(missing)}, of which the file has no tensor; save it again with them, or remove "
        "the names (vLLM: Unsupported modules_to_save)"
    ]


# The ends of an embedding's and an output layer's path by which PEFT knows them.
_TIED_NAMES = ("embed_tokens", "lm_head")


def tying_faults(config: CheckedConfig, layout: ModelLayout | None) -> list[str]:
    """`ensure_weight_tying` where it does something: an embedding or output layer is trained in a model that ties them.

    Rows of tokens are both's with it and without (`peft/tuners/tuners_utils.py::_check_tied_modules`, and
    `peft/utils/other.py::set_additional_trainable_modules`). Raises AdapterError for a pattern that takes too long.
    """
    if not config.values.get("ensure_weight_tying") or (layout is not None and not layout.tied):
        return []
    found = []
    for key in ("target_modules", "modules_to_save"):
        given = config.values.get(key) or ()
        if isinstance(given, str):
            found += [key for name in _TIED_NAMES if full_match(given, name)]
        else:
            found += [key for entry in given if entry.rpartition(".")[2] in _TIED_NAMES]
    if not found:
        return []
    return [
        f"adapter_config.json: 'ensure_weight_tying' is True and {found[0]!r} names an embedding or an output layer, "
        "which PEFT then ties; allowed: False, or a base model that ties none (--base); train it without"
    ]
