"""Texts of unpacked Debian packages -> the demo adapters' training data: `build_data.py UNPACKED OUT`.

Writes king-james.jsonl, italian.jsonl, perl.jsonl and lua.jsonl, one {"text"} a line, shuffled with a fixed seed.
README.md beside this file names the packages.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ITALIAN = ("adams", "computer", "definizioni", "leggi", "norm", "zuse")
PERL_TABLES = ("/Collate/", "/unicore/", "/Locale", "/Test2/")  # data and test machinery, hardly code


def king_james(root: Path) -> list[str]:
    """One document per chapter, verse numbers removed."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-l9999", "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters = (re.sub(r"(?m)^\s*\d+ ", "", chapter) for chapter in re.split(r"(?m)^\S.*? \d+$", text))
    return [" ".join(line.strip() for line in chapter.splitlines() if line.strip()) for chapter in chapters]


def italian(root: Path) -> list[str]:
    """One document per fortune."""
    fortunes = []
    for name in ITALIAN:
        content = (root / "usr/share/games/fortunes/it" / name).read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = content.decode("latin1")
        fortunes += re.split(r"(?m)^%$", text)
    return fortunes


def code(files: Iterable[Path]) -> list[str]:
    """One document per source file of 0.4 to 40 kB, without Perl's embedded manual pages."""
    sources = []
    for file in sorted(files):
        if file.is_symlink() or not 400 < file.stat().st_size < 40000 or any(t in str(file) for t in PERL_TABLES):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        sources.append(re.sub(r"(?ms)^=[a-z]\w*.*?(^=cut[^\n]*$|\Z)", "", text).split("\n__END__")[0])
    return sources


def write(path: Path, documents: Iterable[str]) -> None:
    documents = [document.strip() + "\n" for document in documents if len(document.strip()) > 80]
    random.Random(0).shuffle(documents)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    print(f"{path}: {len(documents)} documents")


def main(unpacked: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write(out / "king-james.jsonl", king_james(unpacked))
    write(out / "italian.jsonl", italian(unpacked))
    write(out / "perl.jsonl", code((unpacked / "usr/share/perl").rglob("*.pm")))
    write(out / "lua.jsonl", code((unpacked / "usr/share/lua").rglob("*.lua")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
