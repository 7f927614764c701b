"""One adapter directory -> what a worker keeps of it: every layer's slot contents, cut to this rank.

A worker may evict an adapter and need it again in the middle of a step, where a failure would end the engine. So the
files' content is copied once when the adapter is admitted, and a reload reads that copy, not the original, which may
have changed or gone. The copies live in a private temporary directory that ends with the process.
"""

import errno
import functools
import logging
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flora_vllm.adapter import Adapter, ModuleTerms
from flora_vllm.compact import CompactLayers
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.arrow import Routing, arrow_files
from flora_vllm.formats.files import collect_files, digest_of
from flora_vllm.formats.lora_merges import LoraPart, merged_lora
from flora_vllm.formats.lora_writer import lora_files
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files, warn_of
from flora_vllm.formats.tasks import digest_of_task, split_task
from flora_vllm.mixing import mix_faults, mixed
from flora_vllm.ops.terms import LayerTerms
from flora_vllm.pacing import pace
from flora_vllm.plugin import scratch
from flora_vllm.plugin.attach import Attached
from flora_vllm.plugin.feed_forward import routed_faults
from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.loads import Loads
from flora_vllm.plugin.mixes import MIX, Mix, Part, decoded
from flora_vllm.plugin.model_layout import model_layout
from flora_vllm.plugin.planned import Plans
from flora_vllm.plugin.probe import ANOTHER_RANK, EngineBase, all_agree, stages_agree, together
from flora_vllm.plugin.saved import with_saved
from flora_vllm.slots import layer_terms, overflowed
from flora_vllm.terms import Arena, FromBase, kind_of, resolve

logger = logging.getLogger(__name__)

# Copies kept of adapters that were unloaded while a request may still have been on its way to the engine.
RETIRED_COPIES = 64
# What a file system says that has no more room.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, eq=False)
class CutAdapter:
    """An adapter for one worker: its family (MIX: of several), its rank, layer name -> slot contents, and from which
    sequence on it applies."""

    family: str
    rank: int
    layers: CompactLayers
    invocation_tokens: tuple[int, ...] | None


class AdapterLoader:
    """Reads, checks and cuts adapters for one worker. Owns the copies."""

    def __init__(
        self,
        attached: Attached,
        limits: Limits,
        model: Any,
        base: EngineBase,
        *,
        has_encoder: bool,
        loads: Loads,
        adapter_root: str | None = None,
    ) -> None:
        self._phase = loads.phase
        self._attached = attached
        self._model = model
        self._limits = limits
        self._base = base
        self._device = base.device
        self._layout = model_layout(attached, model)
        self._adapter_root = None if adapter_root is None else os.path.realpath(adapter_root)
        self._has_encoder = has_encoder
        self._root = scratch.make("flora-adapters-")
        weakref.finalize(self, scratch.remove, self._root)
        self._retired: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, str] = {}  # whose the copies are
        self._plans = Plans()

    def load(
        self,
        adapter_id: int,
        lora_name: str,
        path: str,
        *,
        fresh: bool,
        again: bool,
        note: Callable[[CutAdapter], None],
        check: Callable[[CutAdapter], None],
    ) -> CutAdapter:
        """The adapter, from `path` if `fresh` or never read before, else from the copy. `check` may raise to refuse it;
        `note` is called before, of every adapter that the ranks could read: they may ask each other in it.

        `again`: it had been evicted; maybe within a step, where pipeline stages cannot wait for each other. One that
        was unloaded and is loaded anew has to fit again, and its copy has to stay again.

        Raises AdapterError with every fault of the adapter; a copy that is there is then left as it is.
        """
        name, digest = split_identity(lora_name)
        copy = self._root / str(adapter_id)
        # Of all ranks or of none, which then ask each other alike: a full disk may have taken the copy of one.
        has_copy = all_agree(not fresh and self._names.get(adapter_id) == lora_name and copy.is_dir(), self._device)
        mix = decoded(path)
        unfinished: Path | None = None

        def read() -> tuple[dict[str, bytearray], CutAdapter]:
            if mix is not None and mix.method is None:
                return self._read_mix(name, mix.parts, copy if has_copy else None)
            if mix is not None and not has_copy:
                return self._read_merge(name, mix)
            directory, task = (path, None) if mix is not None else split_task(path)
            place, expected = (copy, None) if has_copy else (directory, digest)
            return self._read(name, place, expected, path, task)

        if has_copy and again:
            adapter = read()[1]
            note(adapter)
            return adapter

        def keep(files: Mapping[str, bytearray], adapter: CutAdapter) -> None:
            nonlocal unfinished
            check(adapter)
            with self._phase("keep"):
                unfinished = self._keep(files, name)

        try:
            (files, adapter), error = read(), None
            note(adapter)
            together(repr(name), self._device, functools.partial(keep, files, adapter))
        except Exception as failure:  # noqa: BLE001 - raised below; the other stages wait for this one's word
            adapter, error = CutAdapter("", 0, CompactLayers({}), None), failure
        # What was only evicted here other pipeline stages may have, and they would not be asked.
        is_asked = not again and (not has_copy or adapter_id in self._retired)
        is_kept = stages_agree(error is None) if is_asked else error is None
        if not is_kept or unfinished is None:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise error or adapter_error(f"{name!r} ({path})", [ANOTHER_RANK])
        shutil.rmtree(copy, ignore_errors=True)
        unfinished.rename(copy)
        self._names[adapter_id] = lora_name
        self._retired.pop(adapter_id, None)
        return adapter

    def is_of(self, adapter_id: int, lora_name: str) -> bool:
        """Whether what was loaded last under this id is this adapter."""
        return self._names.get(adapter_id) == lora_name

    def forget_base(self) -> None:
        """Its weights may be others from now on."""
        self._base.forget()

    def retire(self, adapter_id: int) -> None:
        """The adapter was unloaded: its copy may go once no request can be on its way any more."""
        if (self._root / str(adapter_id)).is_dir():
            self._retired[adapter_id] = None
        while len(self._retired) > RETIRED_COPIES:
            self._drop_oldest()

    def _read(self, name: str, place: Path | str, digest: str | None, shown: str, task: str | None):
        where = f"{name!r} ({shown})"

        def examined() -> tuple[dict[str, bytearray], CutAdapter | Adapter]:
            files, faults = self._collected(place, digest, task)
            with self._phase("cut"):
                planned = None if faults else self._plans.load(files, task)
            if planned is None:
                return files, self._examined(where, files, faults, task)
            known, layers = planned
            return files, CutAdapter(known.family, known.rank, layers, known.invocation_tokens)

        files, found = together(where, self._device, examined)
        warn_of(found.family, where)
        return files, together(where, self._device, lambda: self._cut_once(where, files, found, task))

    def _collected(
        self, place: Path | str, digest: str | None, task: str | None
    ) -> tuple[dict[str, bytearray], list[str]]:
        """`place`: a copy of ours, or what a request names, maybe on the hub."""
        with self._phase("read"):
            path = place if isinstance(place, Path) else _local(place)
            files, faults = collect_files(path, self._root_of(path))
            if faults or digest is None or digest == digest_of_task(digest_of(dict(files)), task):
                return files, [*faults]
            return files, ["the directory changed after the server read it; load it again"]

    def _examined(self, where: str, files: Mapping[str, bytearray], faults: Sequence[str], task: str | None) -> Adapter:
        """The adapter in the files."""
        with self._phase("check"):
            found = examine_files(files, self._layout, self._limits, task)
        faults = [*faults, *found.faults]
        adapter = found.adapter
        if adapter is not None:
            adapter, more = with_saved(adapter, self._model, self._layout, self._limits, self._attached.norms)
            faults += more
        if self._has_encoder and adapter is not None and adapter.invocation_tokens is not None:
            faults.append("alora_invocation_tokens: an encoder's rows have no place before or after them; leave it out")
        if faults or adapter is None:
            raise adapter_error(where, faults)
        if found.left_out:
            few = f"{len(found.left_out)} tensors of modules that this engine never runs"
            logger.warning("adapter %s: %s are left out, for example %r", where, few, found.left_out[0])
        return adapter

    def _cut_once(
        self, where: str, files: Mapping[str, bytearray], found: CutAdapter | Adapter, task: str | None
    ) -> CutAdapter:
        if isinstance(found, CutAdapter):
            return found
        with self._phase("cut"):
            layers, arenas = self._cut(where, found)
            self._plans.learn(files, task, found, arenas, layers)
        return CutAdapter(found.family, found.rank, layers, found.invocation_tokens)

    def _read_merge(self, name: str, mix: Mix) -> tuple[dict[str, bytearray], CutAdapter]:
        """The adapter that the parts become, as `flora-vllm merge` would write it: files of its own, read like any."""
        method = mix.method
        assert method is not None, "the sum of parts is no merge"
        parts = [
            together(repr(name), self._device, functools.partial(self._part, part, *self._place_of(part)))
            for part in mix.parts
        ]

        def merge() -> tuple[dict[str, bytearray], Adapter]:
            if isinstance(method, Routing):
                merged = arrow_files(parts, (), method)
            else:
                merged = lora_files(merged_lora(parts, method), parts[0].adapter.base_model)
            found = examine_files(merged, self._layout, self._limits)
            if found.adapter is None:
                raise adapter_error(repr(name), found.faults)
            return merged, found.adapter

        merged, adapter = together(repr(name), self._device, merge)
        return merged, together(repr(name), self._device, lambda: self._cut_once(repr(name), merged, adapter, None))

    def _place_of(self, part: Part) -> tuple[Path | str, str | None]:
        """(where every rank finds its files, task): the copy of an adapter that is loaded, whose own directory may be
        gone (an upload's is, once it was answered); else that."""
        directory, task = split_task(part.path)
        # Adapters are removed between steps while this reads beside them.
        ids = [number for number, name in [*self._names.items()] if name == part.name]
        copy = self._root / str(ids[0]) if ids else None
        has_copy = all_agree(copy is not None and copy.is_dir(), self._device)
        return (copy if copy is not None and has_copy else directory), task

    def _part(self, part: Part, place: Path | str, task: str | None) -> LoraPart:
        plain, digest = split_identity(part.name)
        files, faults = self._collected(place, digest, task)
        where = f"{plain!r} ({part.path})"
        adapter = self._examined(where, files, faults, task)
        warn_of(adapter.family, where)
        return LoraPart(part.weight, repr(plain), files, adapter)

    def _read_mix(self, name: str, parts: Sequence[Part], copy: Path | None) -> tuple[dict[str, bytearray], CutAdapter]:
        """Every part's files, by part, and the mix as one adapter; from the mix's own `copy` if it has one."""
        files: dict[str, bytearray] = {}
        cut: list[CutAdapter] = []
        for number, part in enumerate(parts):
            plain, digest = split_identity(part.name)
            if copy is None:
                place, task = self._place_of(part)
            else:
                place, task, digest = copy / str(number), split_task(part.path)[1], None
            part_files, adapter = self._read(plain, place, digest, part.path, task)
            files |= {f"{number}/{file}": content for file, content in part_files.items()}
            cut.append(adapter)
        return files, together(repr(name), self._device, lambda: self._mix(name, parts, cut))

    def _mix(self, name: str, parts: Sequence[Part], cut: Sequence[CutAdapter]) -> CutAdapter:
        faults = []
        layers: dict[str, LayerTerms] = {}
        try:
            sizes = {name: layout.sizes for name, layout in self._attached.layouts.items()}
            layers = mixed([(part.weight, adapter.layers) for part, adapter in zip(parts, cut, strict=True)], sizes)
        except AdapterError as error:
            faults.append(str(error))
        if [part.weight for part in parts] != [1] and any(name in self._attached.norms for name in layers):
            faults.append("a part has norms of its own, which have no weighted sum with the base's here; use it alone")
        if len({adapter.invocation_tokens for adapter in cut}) > 1:
            faults.append("its parts begin at different tokens (alora_invocation_tokens); mix adapters with the same")
        faults += mix_faults(layers, self._limits.flora, self._limits.lora)
        kept = CompactLayers(layers)
        if not kept.is_finite():
            faults.append("its weighted values leave the range of the model's dtype; use smaller weights")
        if faults:
            raise adapter_error(f"{name!r}, a mix of {', '.join(part.name for part in parts)},", faults)
        return CutAdapter(MIX, sum(adapter.rank for adapter in cut), kept, cut[0].invocation_tokens)

    def _root_of(self, path: Path) -> str | None:
        """The operator's root if `path` names something below it: then nothing outside it is read.

        Paths that came by request are always such, and the server has resolved their links; others are the operator's.
        """
        if self._adapter_root is None or not path.is_relative_to(self._adapter_root):
            return None
        return self._adapter_root

    def _cut(self, where: str, adapter: Adapter) -> tuple[CompactLayers, list[Arena]]:
        modules = self._resolved(where, adapter)
        layers: dict[str, LayerTerms] = {}
        faults = []
        # Whole matrices are copied once, not made in an arena.
        factors = (t for terms in modules.values() for t in terms.terms if not kind_of(t).dense_bytes(t))
        own = {id(tensor): tensor for term in factors for tensor in kind_of(term).tensors(term)}
        numbers = sum(tensor.numel() for tensor in own.values())
        inputs: dict[tuple, torch.Tensor] = {}
        arenas = {dtype: Arena(dtype, numbers) for dtype in set(self._attached.dtypes.values())}
        for name, layout in self._attached.layouts.items():
            pace()
            parts = [part.module for part in layout.slices if part.module != layout.module]
            if layout.module in modules and (twice := modules.keys() & {*parts}):
                faults.append(f"layer {name!r} has tensors as a whole and as {sorted(twice)}; keep those of one")
                continue
            try:
                dtype = self._attached.dtypes[name]
                bias = self._attached.biases[name]
                terms = layer_terms(layout, modules, dtype, bias, self._device, arenas[dtype], inputs)
            except AdapterError as error:
                faults.append(f"layer {name!r}: {error}")
                continue
            if terms is not None:
                layers[name] = terms
                norm, part = self._attached.norms.get(name), terms[0]
                if norm is not None and part is not None and (fault := norm.fault(part)) is not None:
                    faults.append(f"norm {name!r} {fault}")
        faults += routed_faults(layers, self._attached.blocks)
        chunks = [chunk for arena in arenas.values() for chunk in arena.finished()]
        kept = CompactLayers(layers, chunks)
        if not kept.is_finite():
            faults += [
                f"layer {name!r}: values leave the range of {self._attached.dtypes[name]}, the model's dtype; "
                "serve the model in bfloat16 or float32, or retrain with smaller factors"
                for name, terms in layers.items()
                if overflowed(terms)
            ]
        if faults:
            raise adapter_error(where, faults)
        return kept, [*arenas.values()]

    def _resolved(self, where: str, adapter: Adapter) -> dict[str, ModuleTerms]:
        """The adapter's modules under the engine's names, without terms that had to wait for the base."""
        modules: dict[str, ModuleTerms] = {}
        faults = []
        for module, terms in adapter.modules.items():
            pace()
            place = self._layout.rename(module)
            if not terms.of(FromBase):
                modules[place] = terms
                continue
            if not self._base.holds(place):
                continue
            try:
                modules[place] = ModuleTerms(resolve(terms.terms, self._base.probe(module, place)))
            except AdapterError as error:
                faults.append(f"module {module!r}: {error}")
        if faults:
            raise adapter_error(where, faults)
        return modules

    def _keep(self, files: Mapping[str, bytearray], name: str) -> Path:
        """A copy that has no name yet; those of unloaded adapters give way to it. Raises AdapterError if there is no
        room even so."""
        while True:
            try:
                return self._write(files)
            except OSError as error:
                if error.errno in FULL and self._retired:
                    self._drop_oldest()
                    continue
                needed = sum(map(len, files.values()))
                why, root = error.strerror, self._root
                logger.error("a copy of adapter %r, %d bytes, cannot be kept in %s: %s", name, needed, root, why)
                fault = f"the server cannot keep a copy of its {needed} bytes ({why}); make room in {root}"
                raise adapter_error(repr(name), [fault]) from error

    def _write(self, files: Mapping[str, bytearray]) -> Path:
        unfinished = Path(tempfile.mkdtemp(dir=self._root))
        try:
            for file_name, content in files.items():
                (unfinished / file_name).parent.mkdir(exist_ok=True)
                (unfinished / file_name).write_bytes(content)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return unfinished

    def _drop_oldest(self) -> None:
        """Of the copies of adapters that were unloaded."""
        oldest, _ = self._retired.popitem(last=False)
        self._names.pop(oldest, None)
        shutil.rmtree(self._root / str(oldest), ignore_errors=True)


def _local(path: str) -> Path:
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(path))
