"""Make the training text from the three packages that carry it.

    python jpd/box/text/prepare.py r-cran-janeaustenr_*.deb r-cran-tokenizers_*.deb wordcloud-*.gz

Writes `<book>.txt.xz` beside this file: UTF-8, a paragraph a line block with one blank line between
paragraphs and two between chapters, no headings, no notes of publishers or transcribers.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent

AUSTEN = {
    "EMMA": "austen-emma",
    "MANSFIELD PARK": "austen-mansfield-park",
    "NORTHANGER ABBEY": "austen-northanger-abbey",
    "PERSUASION": "austen-persuasion",
    "PRIDE AND PREJUDICE": "austen-pride-and-prejudice",
    "SENSE AND SENSIBILITY": "austen-sense-and-sensibility",
}
CHAPTER = re.compile(r"chapter [\divxlc]+\b|epilogue$", re.IGNORECASE)
END = re.compile(r"(the end|finis|a note on the text|end of (this )?project gutenberg.*)$", re.I)
SKIP = re.compile(r"volume [ivx]+$|\[.*\b(volume|editions?)\b|[\s*]+$|\*\w", re.IGNORECASE)


def _deb_file(deb: Path, name: str) -> bytes:
    """Contents of the one file called `name` in a Debian package (an `ar` archive of tars)."""
    raw, at = deb.read_bytes(), 8
    while at < len(raw):
        member, size = raw[at : at + 16].decode().strip().rstrip("/"), int(raw[at + 48 : at + 58])
        body, at = raw[at + 60 : at + 60 + size], at + 60 + size + size % 2
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                found = next(m for m in tar if m.name.endswith(name))
                return tar.extractfile(found).read()
    raise ValueError(f"{deb} holds no data archive with {name}")


def _r_strings(rdb: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: zlib chunks of XDR serialisation v3."""
    at = 0
    while at < len(rdb):
        chunk = zlib.decompressobj()
        data = chunk.decompress(rdb[at + 4 :])
        at = len(rdb) - len(chunk.unused_data)
        here = 18 + struct.unpack_from(">I", data, 14)[0]  # magic, versions, name of the encoding
        kind, count = struct.unpack_from(">II", data, here)
        if kind & 0xFF != 16:
            raise ValueError(f"R object of type {kind & 0xFF}, wanted a character vector (16)")
        here, lines = here + 8, []
        for _ in range(count):
            size = struct.unpack_from(">i", data, here + 4)[0]
            lines.append(data[here + 8 : here + 8 + size].decode())
            here += 8 + size
        yield lines


def _paragraph(lines: list[str]) -> str:
    """One line of prose from hard-wrapped lines; verse keeps its lines."""
    clean = [" ".join(line.split()) for line in lines]
    starts_upper = sum(line.lstrip("\"'(_")[:1].isupper() for line in clean)
    verse = all(line[:1].isspace() for line in lines) and starts_upper > 0.8 * len(lines) > 1
    return ("\n" if verse else " ").join(clean)


def clean_book(text: str, *, single_quotes: bool) -> str:
    """Plain paragraphs of a book: between its first chapter heading and its end.

    Args:
      text: the book as the package has it, lines wrapped by hand.
      single_quotes: speech is in '...' and is turned to "...", as in the other books.

    Returns:
      Paragraphs with one blank line between them and two between chapters.

    Raises:
      ValueError: the text has no chapter heading.
    """
    chapters: list[list[str]] = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        first = lines[0].strip()
        if CHAPTER.match(first):
            chapters.append([])
        elif chapters and END.match(first):
            break
        elif chapters and not SKIP.match(first):
            chapters[-1].append(_paragraph(lines))
    if not chapters:
        raise ValueError("no chapter heading found")
    out = "\n\n\n".join("\n\n".join(chapter) for chapter in chapters if chapter)
    out = re.sub(r"\s*-{2,}\s*(?=\w)|-{2,}", "\u2014", out)
    out = re.sub(r"\b_|_\b|(?<!\w)_|_(?!\w)", "", out).replace("*", "")
    if single_quotes:
        out = re.sub(r"(?<![^\s(\u2014])'(?=\w)|(?<=[,.!?;:\u2014])'(?![^\s)\u2014])", '"', out)
    return out + "\n"


def main() -> None:
    """Command line: three packages in, eight compressed books out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("janeaustenr", type=Path, help="Debian package r-cran-janeaustenr")
    parser.add_argument("tokenizers", type=Path, help="Debian package r-cran-tokenizers")
    parser.add_argument("wordcloud", type=Path, help="source archive of wordcloud from PyPI")
    args = parser.parse_args()

    books = {}
    for lines in _r_strings(_deb_file(args.janeaustenr, "janeaustenr/data/Rdata.rdb")):
        books[AUSTEN[lines[0].upper()]] = clean_book("\n".join(lines), single_quotes=False)
    (moby,) = _r_strings(_deb_file(args.tokenizers, "tokenizers/data/Rdata.rdb"))
    books["melville-moby-dick"] = clean_book("\n".join(moby), single_quotes=False)
    with tarfile.open(args.wordcloud) as tar:
        member = next(m for m in tar if m.name.endswith("examples/alice.txt"))
        alice = tar.extractfile(member).read().decode("utf-8-sig")
    books["carroll-alice"] = clean_book(alice, single_quotes=True)

    for name, text in books.items():
        data = text.encode()
        (HERE / f"{name}.txt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        print(f"{name}: {len(data)} bytes, {text.count(chr(10) * 3) + 1} chapters")


if __name__ == "__main__":
    main()
