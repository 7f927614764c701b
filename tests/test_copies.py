"""A worker's own copies of adapters' files: they outlive the originals for as long as the adapter may be asked for."""

import contextlib
import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import AdapterError
from flora_vllm.plugin.refusals import is_passing


class Loader:
    """The loader without a model: it reads any file and judges none."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from flora_vllm.compact import CompactLayers
        from flora_vllm.plugin import loader

        self.asked = 0

        def stages_agree(fine: bool) -> bool:
            self.asked += 1
            return fine

        def together(where: str, device: Any, make: Any) -> Any:
            made = make()
            if not self.others_agree:
                raise AdapterError(f"{where}: another rank")
            return made

        self.others_agree = self.others_have_copies = True
        monkeypatch.setattr(loader, "stages_agree", stages_agree)
        monkeypatch.setattr(loader, "together", together)
        monkeypatch.setattr(loader, "all_agree", lambda fine, _: fine and self.others_have_copies)
        monkeypatch.setattr(loader, "RETIRED_COPIES", 2)
        self.loader: Any = object.__new__(loader.AdapterLoader)
        self.loader._root, self.loader._names, self.loader._retired = folder, {}, loader.OrderedDict()
        self.loader._phase, self.loader._device = lambda _: contextlib.nullcontext(), None

        def read(name: str, place: Path | str, *_: Any) -> Any:
            path = Path(place)
            if not path.is_dir():
                raise AdapterError("nothing is there")
            files = {file.name: bytearray(file.read_bytes()) for file in path.iterdir()}
            return files, loader.CutAdapter("any", 1, CompactLayers({}), None)

        self.loader._read = read
        self.checked: list[int] = []
        self.noted: list[Any] = []

    def load(self, adapter: int, path: Path, *, again: bool = False) -> None:
        def check(_: Any) -> None:
            self.checked.append(adapter)

        note, name = self.noted.append, f"a{adapter}"
        self.loader.load(adapter, name, str(path), fresh=False, again=again, note=note, check=check)


def test_a_copy_of_what_is_loaded_anew_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, copies = tmp_path / "original", tmp_path / "copies"
    original.mkdir()
    copies.mkdir()
    (original / "file").write_text("content")
    loader = Loader(copies, monkeypatch)
    for adapter in range(1, 5):
        loader.load(adapter, original)
    loader.load(1, original)
    assert loader.asked == 4, "of one that was evicted: other pipeline stages may have it, and would not be asked"
    loader.loader.retire(1)
    loader.checked.clear()
    loader.load(1, original)
    assert loader.asked == 5
    assert loader.checked == [1], "it has to fit again"
    for adapter in (2, 3, 4):
        loader.loader.retire(adapter)
    assert sorted(path.name for path in copies.iterdir()) == ["1", "3", "4"]
    (original / "file").unlink()
    original.rmdir()
    loader.noted.clear()
    loader.load(1, original, again=True)
    assert len(loader.noted) == 1, "what was brought back, too"
    with pytest.raises(AdapterError, match="nothing is there"):
        loader.load(2, original, again=True)


def test_a_copy_that_another_rank_lacks_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ranks that read from different places would ask each other different things."""
    original = tmp_path / "original"
    original.mkdir()
    (tmp_path / "copies").mkdir()
    loader = Loader(tmp_path / "copies", monkeypatch)
    loader.load(1, original)
    loader.others_have_copies = False
    loader.checked.clear()
    loader.load(1, original, again=True)
    assert loader.checked == [1], "as on the rank that has none"
    original.rmdir()
    with pytest.raises(AdapterError, match="nothing is there"):
        loader.load(1, original, again=True)


@pytest.mark.parametrize("copies", [True, False])
def test_a_mix_reads_a_part_where_the_part_is_kept(copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An upload's directory is gone once it was loaded. Ranks that differ in their copies read where it came from."""
    from flora_vllm.plugin.mixes import Part

    original = tmp_path / "original"
    original.mkdir()
    (tmp_path / "copies").mkdir()
    (original / "file").write_text("content")
    loader = Loader(tmp_path / "copies", monkeypatch)
    loader.load(1, original)
    shutil.rmtree(original)
    own = loader.loader
    own._collected = lambda place, *_: (own._read("", place)[0], [])
    own._examined = lambda *_: SimpleNamespace(family="any")
    own._mix = lambda name, parts, cut: cut[0]
    monkeypatch.setattr("flora_vllm.plugin.loader.warn_of", lambda *_: None)
    loader.others_have_copies = copies
    part = Part(0.5, "a1", str(original))
    for read in (lambda: own._read_mix("m", [part], None)[0], lambda: own._part(part, *own._place_of(part)).files):
        if copies:
            assert [bytes(content) for content in read().values()] == [b"content"]
        else:
            with pytest.raises(AdapterError, match="nothing is there"):
                read()


def test_copies_of_the_unloaded_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """A disk for two copies."""
    original, copies = tmp_path / "original", tmp_path / "copies"
    original.mkdir()
    copies.mkdir()
    (original / "file").write_text("content")
    loader = Loader(copies, monkeypatch)
    write = Path.write_bytes

    def write_if_there_is_room(self: Path, content: bytes) -> int:
        if sum(file.is_file() for file in copies.glob("*/file")) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", write_if_there_is_room)
    loader.load(1, original)
    loader.load(2, original)
    with pytest.raises(AdapterError, match=rf"7 bytes \(No space left on device\); make room in {copies}") as refused:
        loader.load(3, original)
    assert is_passing(str(refused.value))
    assert f"'a3', 7 bytes, cannot be kept in {copies}: No space" in caplog.text
    loader.loader.retire(1)
    loader.load(3, original)
    assert sorted(path.name for path in copies.iterdir()) == ["2", "3"], "and nothing unfinished"
    shutil.rmtree(original)
    loader.load(3, original, again=True)


def test_ranks_keep_a_copy_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that had it alone would ask the others for less, or for more, than they answer."""
    original, copies = tmp_path / "original", tmp_path / "copies"
    original.mkdir()
    copies.mkdir()
    (original / "file").write_text("old")
    loader = Loader(copies, monkeypatch)
    loader.load(1, original)
    (original / "file").write_text("new")
    loader.others_agree = loader.others_have_copies = False
    for adapter in (1, 2):
        with pytest.raises(AdapterError, match="another rank"):
            loader.load(adapter, original)
    assert [path.name for path in copies.iterdir()] == ["1"], "and nothing unfinished"
    assert (copies / "1" / "file").read_text() == "old"
    loader.others_agree = True
    loader.load(1, original, again=True)
    assert (copies / "1" / "file").read_text() == "new", "read where those must that have none"


def test_a_directory_for_copies_that_is_gone_refuses_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "original").mkdir()
    loader = Loader(tmp_path / "copies", monkeypatch)
    with pytest.raises(AdapterError, match="No such file or directory"):
        loader.load(1, tmp_path / "original")
