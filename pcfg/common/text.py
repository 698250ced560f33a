"""Text files: shards of plain sentences and CSV files of labelled ones. No other module opens them by hand.

A sentence is its words, separated by single spaces. A text file (`.txt`) has one sentence per line and an empty line between
two; a CSV file has a column `text` and, where labels are needed, an integer column `label`.
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pcfg.common.files import AnyPath, InputError, atomic_open, atomic_path

SPLITS = ("training", "test")
TEXT_MANIFEST = "manifest_pretraining.json"  # of generate_pretraining.py, next to the shards
BLOCK_BYTES = 1 << 22  # of `text_blocks`: some 50,000 sentences of ten words
CACHE_BYTES = 1 << 23  # of a shard that is being written, in the page cache


def shown(text: str) -> str:
    """`text` in quotes for a message, cut if it is long.

    >>> print(shown("a" * 1_000_000))
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' and 999,940 characters more
    """
    return repr(text) if len(text) <= 60 else f"{text[:60]!r} and {len(text) - 60:,} characters more"


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name one text or CSV file") from None


def decode_block(content: bytes, source: object, lines_before: int = 0) -> str:
    """UTF-8 bytes of a file after `lines_before` lines as text; a byte order mark is a character like any other."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        wrong = f"not UTF-8 (byte 0x{content[error.start]:02x})"
        raise InputError(f"{source}:{line}: {wrong}; convert the file to UTF-8") from None


def decoded(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; that of a `.gz` file is decompressed."""
    with _opening(path):
        content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cut short or damaged ({error}); fetch it again") from None
    return decode_block(content.removeprefix(codecs.BOM_UTF8), path)


def csv_rows(path: Path, columns: tuple[str, ...]) -> tuple[list[int], list[dict]]:
    """The line on which each row of a CSV file ends, and the rows, none of which may lack one of the `columns`.

    A `.tsv` file is GLUE's kind: tabs between the columns, and quotes are characters like any other.
    """
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ".tsv" in path.suffixes[-2:] else {}
    # strict: a quote that is never closed is an error, and not a sentence that swallows the rest of the file.
    reader = csv.DictReader(io.StringIO(decoded(path), newline=""), strict=True, **dialect)
    lines: list[int] = []
    rows: list[dict] = []
    try:
        names = reader.fieldnames or []
        if missing := [column for column in columns if column not in names]:
            header = ",".join(names)
            raise InputError(f"{path}:1: no column {missing[0]!r}; the header is {header!r}; columns needed: {columns}")
        for row in reader:
            lines.append(reader.line_num)
            rows.append(row)
            if None in row:  # where DictReader puts what the header has no name for
                number = len(row) - 1 + len(row[None])
                advice = "remove the tabs that do not separate two columns, also at the end of the line"
                if not dialect:
                    advice = "a text with the delimiter in it needs quotes around it"
                raise InputError(f"{path}:{reader.line_num}: {number} columns, the header has {len(names)}; {advice}")
            for column in columns:
                if not (row[column] or "").strip():
                    raise InputError(f"{path}:{reader.line_num}: empty {column!r}; remove the row or fill it in")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not a CSV file ({error})") from None
    if not rows:
        raise InputError(f"{path}: no sentences; the file is empty")
    return lines, rows


def read_texts(path: AnyPath) -> list[str]:
    """The sentences of a text file (`.txt`, or any other suffix) or of the column `text` of a `.csv` file, in order.

    Blank lines of a text file are skipped.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return [row["text"].strip() for row in csv_rows(path, ("text",))[1]]
    # split("\n"), because splitlines() would also cut at characters such as U+2028.
    texts = [stripped for line in decoded(path).split("\n") if (stripped := line.strip())]
    if not texts:
        raise InputError(f"{path}: no sentences; the file is empty")
    return texts


def text_blocks(path: AnyPath, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The sentences of `read_texts` as blocks of UTF-8 bytes, in order; memory does not grow with the size of the file.

    The blocks of a text file are its bytes (blank lines included) without a byte order mark, cut at line ends. Those of a
    CSV file, which is read at once, have one sentence per line. Errors come after the blocks before their place. `size` is in
    bytes per block, apart from the rest of its last line.
    """
    path = Path(path)
    if path.suffix == ".csv":
        texts = read_texts(path)
        yield "".join(" ".join(text.split()) + "\n" for text in texts).encode()
        return
    lines = 0
    blank = True
    with _opening(path), open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while block := file.read(size):
            if not block.endswith(b"\n"):
                block += file.readline()
            text = decode_block(block, path, lines)
            blank = blank and not text.strip()
            lines += block.count(b"\n")
            yield block
    if blank:
        raise InputError(f"{path}: no sentences; the file is empty")


def read_labelled(path: AnyPath) -> tuple[list[str], list[int]]:
    """The sentences of a CSV file with the columns `text` and `label`, and the labels, integers of at most 9 digits."""
    path = Path(path)
    lines, rows = csv_rows(path, ("text", "label"))
    labels = []
    for line, row in zip(lines, rows, strict=True):
        if not re.fullmatch(r"[0-9]{1,9}", row["label"].strip()):
            wrong = f"label {shown(row['label'])}; it must be an integer of 0 or more, of at most 9 digits"
            raise InputError(f"{path}:{line}: {wrong}; number the classes, or remove sentences without one")
        labels.append(int(row["label"]))
    return [row["text"].strip() for row in rows], labels


def write_labelled(path: AnyPath, texts: Iterable[str], labels: Iterable[int]) -> None:
    """Write a CSV file with the header `text,label`, atomically."""
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows((text, int(label)) for text, label in zip(texts, labels, strict=True))


def shard_name(split: str, number: int) -> str:
    """The file name of text shard `number` of a split.

    >>> shard_name("training", 3)
    'training3.txt'
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {SPLITS}")
    return f"{split}{number}.txt"


def shard_paths(folder: AnyPath, split: str) -> list[Path]:
    """The text shards of a split in `folder`, in the order of their numbers; without shards an empty list."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make the text with generate_pretraining.py first")
    matches = (re.fullmatch(rf"{split}(0|[1-9][0-9]*)\.txt", path.name) for path in folder.iterdir())
    return [folder / shard_name(split, number) for number in sorted(int(match[1]) for match in matches if match)]


def write_shard(path: AnyPath, blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a text shard from blocks of lines, atomically; an empty line is put between two blocks as between sentences.

    Shards are tens of gigabytes that nobody reads again soon, so they are not left in the page cache. Returns size and sha256
    of the file, as `Manifest.add` takes them.
    """
    digest = hashlib.sha256()
    size = 0
    cached = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for number, block in enumerate(blocks):
            for part in (b"\n", block) if number else (block,):
                digest.update(part)  # like writing, it lets other threads run
                file.write(part)
                size += len(part)
            if size - cached > CACHE_BYTES:
                _leave_cache(file)
                cached = size
        file.flush()
        os.fsync(file.fileno())
        _leave_cache(file)
    return {"size": size, "sha256": digest.hexdigest()}


def _leave_cache(file: io.BufferedWriter) -> None:
    """Let the system write a file to disk in the background, and drop from its cache the part that is there."""
    file.flush()
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
