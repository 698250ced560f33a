"""Text files: shards of plain sentences and CSV files of labelled ones. No other module opens them by hand.

A sentence is its words, separated by single spaces. A text file (`.txt`) has one sentence a line and an empty line between
two; a CSV file has a column `text` and, where labels are wanted, an integer column `label`.
"""

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pcfg.common.direct import DirectWriter
from pcfg.common.files import HashedFile, InputError, atomic_open, atomic_path

SPLITS = ("training", "test")
TEXT_MANIFEST = "manifest_pretraining.json"  # of generate_pretraining.py, beside the shards
BLOCK_BYTES = 1 << 22  # of `text_blocks`: some 50,000 sentences of ten words


def shown(text: str) -> str:
    """`text` in quotes for a message, its end left out if it is long.

    >>> print(shown("a" * 1_000_000))
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' and 999,940 characters more
    """
    return repr(text) if len(text) <= 60 else f"{text[:60]!r} and {len(text) - 60:,} characters more"


@contextlib.contextmanager
def _opening(path: Path):
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name one text or CSV file") from None


def decode_block(content: bytes, source, lines_before: int = 0) -> str:
    """UTF-8 bytes as text; a byte order mark is a character like any other.

    Args:
        source: the file that they are from, for messages.
        lines_before: lines of the file that came before them, for messages.

    Raises:
        InputError: not UTF-8 (with the line).
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        wrong = f"not UTF-8 (byte 0x{content[error.start]:02x})"
        raise InputError(f"{source}:{line}: {wrong}; convert the file to UTF-8") from None


def decoded(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InputError: the file is missing, a folder, or not UTF-8 (with the line).
    """
    with _opening(path):
        content = path.read_bytes()
    return decode_block(content.removeprefix(codecs.BOM_UTF8), path)


def csv_rows(path: Path, columns: tuple[str, ...]) -> tuple[list[int], list[dict]]:
    """The rows of a CSV file that must have `columns`, none of them empty, and the line on which each row ends.

    A `.tsv` file is GLUE's kind: tabs between the columns, and quotes are characters like any other.

    Raises:
        InputError: the file is missing, without rows, not UTF-8 or not CSV; a column is missing, or a row has another number
            of columns than the header or nothing in a column (with its line).
    """
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    # strict: a quote that is never closed is an error, and not a sentence that swallows the rest of the file.
    reader = csv.DictReader(io.StringIO(decoded(path), newline=""), strict=True, **dialect)
    lines, rows = [], []
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            header = ",".join(reader.fieldnames or [])
            raise InputError(f"{path}:1: no column {missing[0]!r}; the header is {header!r}; columns needed: {columns}")
        for row in reader:
            lines.append(reader.line_num)
            rows.append(row)
            if None in row:  # where DictReader puts what the header has no name for
                number, wanted = len(row) - 1 + len(row[None]), len(reader.fieldnames)
                raise InputError(
                    f"{path}:{reader.line_num}: {number} columns, the header has {wanted}; a text with the delimiter in it "
                    "needs quotes around it"
                )
            for column in columns:
                if not (row[column] or "").strip():
                    raise InputError(f"{path}:{reader.line_num}: empty {column!r}; remove the row or fill it in")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not a CSV file ({error})") from None
    if not rows:
        raise InputError(f"{path}: no sentences; the file is empty")
    return lines, rows


def read_texts(path) -> list[str]:
    """The sentences of a text file (`.txt`, or any other suffix) or of the column `text` of a `.csv` file, in order.

    Blank lines of a text file are skipped.

    Raises:
        InputError: the file is missing, without sentences, not UTF-8 (with its line), or a CSV file without `text`.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return [row["text"].strip() for row in csv_rows(path, ("text",))[1]]
    # split("\n"), because splitlines() would also cut at characters such as U+2028.
    texts = [stripped for line in decoded(path).split("\n") if (stripped := line.strip())]
    if not texts:
        raise InputError(f"{path}: no sentences; the file is empty")
    return texts


def text_blocks(path, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The sentences of `read_texts` as blocks of UTF-8 bytes, in order, in memory that the file's size does not matter to.

    The blocks of a text file are its bytes (blank lines included) without a byte order mark, cut at line ends; those of a
    CSV file, which is read at once, have one sentence a line.

    Args:
        size: bytes of a block; it is longer by what its last line needs.

    Raises:
        InputError: as `read_texts`, but after the blocks before the place of the error.
    """
    path = Path(path)
    if path.suffix == ".csv":
        texts = read_texts(path)
        yield "".join(" ".join(text.split()) + "\n" for text in texts).encode()
        return
    lines, blank = 0, True
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


def read_labelled(path) -> tuple[list[str], list[int]]:
    """The sentences and the integer labels of a CSV file with the columns `text` and `label`.

    Raises:
        InputError: as `read_texts`; a column is missing; a label is not an integer of 0 or more (with its line).
    """
    path = Path(path)
    lines, rows = csv_rows(path, ("text", "label"))
    labels = []
    for line, row in zip(lines, rows, strict=True):
        if not re.fullmatch(r"[0-9]+", row["label"].strip()):
            raise InputError(f"{path}:{line}: label {row['label']!r}; it must be an integer of 0 or more")
        labels.append(int(row["label"]))
    return [row["text"].strip() for row in rows], labels


def write_labelled(path, texts: list[str], labels: list[int]) -> None:
    """Write a CSV file with the header `text,label`, atomically."""
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows((text, int(label)) for text, label in zip(texts, labels, strict=True))


def shard_name(split: str, number: int) -> str:
    """The file name of text shard `number` of `split`, "training" or "test".

    >>> shard_name("training", 3)
    'training3.txt'
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {SPLITS}")
    return f"{split}{number}.txt"


def shard_paths(folder, split: str) -> list[Path]:
    """The text shards of `split` ("training" or "test") in `folder`, in the order of their numbers; none: an empty list.

    Raises:
        InputError: `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make the text with generate_pretraining.py first")
    numbers = (re.fullmatch(r"[a-z]+(0|[1-9][0-9]*)\.txt", path.name) for path in folder.iterdir())
    candidates = sorted(int(match[1]) for match in numbers if match and match[0] == shard_name(split, int(match[1])))
    return [folder / shard_name(split, number) for number in candidates]


def write_shard(path, blocks: Iterable[bytes | memoryview]) -> dict:
    """Write a text shard from blocks of lines, atomically; an empty line is put between two blocks as between sentences.

    Returns:
        size and sha256 of the file, as `Manifest.add` takes them.
    """
    with atomic_path(path) as temporary, DirectWriter(temporary) as file:
        hashed = HashedFile(file)
        for number, block in enumerate(blocks):
            if number:
                hashed.write(b"\n")
            hashed.write(block)
    return hashed.facts()
