"""Documents of a corpus: local files in several formats, or a data set of the hub, in pieces that are read side by side.

Text and JSON lines are read here, line by line, and not by `datasets`: its readers stop at the first line that is not UTF-8 or
not JSON, and a corpus of millions of documents has such lines. They are dropped and counted. Parquet, Arrow and the hub go
through `datasets`, streaming. Nothing that comes with a data set is executed.
"""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pcfg.common.files import InputError
from pretraining.data.vocabulary import hub_is_off

COMPRESSIONS = (".gz", ".zst")
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
RANGE_BYTES = 1 << 26  # of an uncompressed file of lines in one piece
END_BYTES = 1 << 20  # read at both ends of a file for its identity
ROWS_AT_ONCE = 256
WRONG_LINES = 100  # at the beginning of a file, after which it is taken for something else than JSON lines
LOOK_BACK = 1 << 16  # bytes before a range in which the line before it is looked for
TXT_DOCUMENTS = ("blank-line", "line", "file")
# Where a name is not that of the hub: repository and revision. Both data sets were loading scripts once, which nobody runs any
# more; the hub keeps what they gave as parquet files.
HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet"),
    "bookcorpus": ("bookcorpus/bookcorpus", "refs/convert/parquet"),
}


class DamagedError(Exception):
    """A file that can't be read to its end: what it is, without its name."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the corpus that one job reads: a file, a range of its bytes, or a shard of a hub data set.

    Args:
        path: of the file, or the name of the hub data set.
        kind: a value of `KINDS`, or "hub".
        compression: a member of `COMPRESSIONS`, or "".
        start, stop: bytes of the file; the documents that begin there belong to the piece. Of the hub: shard and shards.
        size: bytes to be read, for the progress; 0 where it is not known.
    """

    path: str
    kind: str
    compression: str
    start: int
    stop: int
    size: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files become documents.

    Args:
        column: of JSON lines, parquet, Arrow and the hub: which one is the text.
        txt_documents: of .txt files, a member of `TXT_DOCUMENTS`.
        config, split, revision: of a hub data set.
    """

    column: str = "text"
    txt_documents: str = "blank-line"
    config: str | None = None
    split: str = "train"
    revision: str | None = None


def _format(path: Path) -> tuple[str, str] | None:
    """Kind and compression of a file by its name; None if it is none of those that are read."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = KINDS.get(Path(path.stem).suffix if compression else path.suffix)
    return None if kind is None or (compression and kind not in ("text", "json")) else (kind, compression)


def find_files(path: Path) -> list[Path]:
    """The files of the corpus at `path`, by name: the file itself, or all in the folder (and below) that are of a known kind.

    Raises:
        InputError: none is of a known kind.
    """
    known = ", ".join(KINDS) + "; .txt and .jsonl also with .gz or .zst"
    if path.is_file():
        if _format(path) is None:
            raise InputError(f"--dataset {path}: can't tell what it is from its name; known are {known}")
        return [path]
    every = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = [file for file in every if _format(file) is not None]
    if not files:
        raise InputError(f"--dataset {path}: none of the {len(every)} files there is of a kind that is read ({known})")
    if len(files) < len(every):
        other = next(file for file in every if _format(file) is None)
        print(f"{path}: {len(every) - len(files)} files of other kinds are left out, {other.name} first")
    return files


def identity(file: Path, root: Path) -> list:
    """What tells a file from another version of it: its name, its size, the SHA-256 of its first and last megabyte."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        ends = hashlib.sha256(handle.read(END_BYTES))
        handle.seek(max(0, size - END_BYTES))
        ends.update(handle.read(END_BYTES))
    return [file.relative_to(root).as_posix() if file != root else file.name, size, ends.hexdigest()]


def local_pieces(files: list[Path], reading: Reading) -> list[Piece]:
    """Files in pieces; those of lines that are not compressed in ranges of `RANGE_BYTES`."""
    pieces = []
    for file in files:
        kind, compression = _format(file)
        size = file.stat().st_size
        whole = bool(compression) or kind in ("parquet", "arrow") or (kind == "text" and reading.txt_documents == "file")
        step = max(1, size) if whole else RANGE_BYTES
        for start in range(0, max(1, size), step):
            stop = min(start + step, size)
            pieces.append(Piece(str(file.absolute()), kind, compression, start, stop, stop - start))
    return pieces


def hub_pieces(name: str, reading: Reading) -> list[Piece]:
    """The shards of a hub data set.

    Raises:
        InputError: the hub is off, or has no such data set.
    """
    if hub_is_off():
        raise InputError(
            f"--dataset {name}: no such file or folder, and the hub is off; give a path, or set HF_HUB_OFFLINE=0 to look for "
            "it there"
        )
    shards = _hub(name, reading).num_shards
    return [Piece(name, "hub", "", shard, shards, 0) for shard in range(shards)]


def _hub(name: str, reading: Reading):
    """A hub data set, streaming."""
    import datasets

    repository, revision = HUB_NAMES.get(name, (name, None))
    try:
        return datasets.load_dataset(
            repository, reading.config, split=reading.split, revision=reading.revision or revision, streaming=True
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--dataset {name}: the hub has no such data set, or it can't be loaded ({error})") from None


def read_documents(piece: Piece, reading: Reading, counts: Counter) -> Iterator[str]:
    """The texts of a piece, in order; what is no text is counted in `counts` and left out.

    Raises:
        InputError: no row of the piece has the column of the text (with the columns that there are).
        DamagedError: the file is cut short or damaged; what could be read was given before.
    """
    if piece.kind == "text":
        yield from _texts(piece, reading.txt_documents, counts)
        return
    rows = _json_rows(piece, counts) if piece.kind == "json" else _table_rows(piece, reading)
    found, columns = False, set()
    for row in rows:
        if reading.column not in row:
            columns.update(row)
            counts["rows without the column"] += 1
            continue
        found = True
        value = row[reading.column]
        if isinstance(value, str):
            yield value
        else:
            counts["null" if value is None else "not a string"] += 1
    if columns and not found:
        named = ", ".join(map(repr, sorted(columns)))
        raise InputError(f"{piece.path}: no column {reading.column!r}; there are {named}; give one by --text-column")


@contextlib.contextmanager
def _opened(piece: Piece):
    """The bytes of a file of lines.

    Raises:
        DamagedError: what is compressed is cut short or damaged.
    """
    try:
        if piece.compression == ".gz":
            with gzip.open(piece.path, "rb") as file:
                yield file
        elif piece.compression == ".zst":
            import pyarrow

            # Unlike the package zstandard, it tells a file that is cut short from one that ends.
            with pyarrow.CompressedInputStream(pyarrow.OSFile(piece.path), "zstd") as stream:
                yield io.BufferedReader(stream, 1 << 20)
        else:
            with open(piece.path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{piece.path}: can't be read ({error.strerror})") from None
        raise DamagedError(str(error)) from error


def _line_before(file, start: int) -> bytes:
    """What the file has of the line that ends at or goes on after `start`, up to there, at most `LOOK_BACK` bytes."""
    file.seek(max(0, start - LOOK_BACK))
    before = file.read(start - file.tell())
    return before.removesuffix(b"\n").rpartition(b"\n")[2] + (b"\n" if before.endswith(b"\n") else b"")


def _lines(file, start: int) -> Iterator[tuple[int, bytes, bool]]:
    """The lines that begin at `start` or after it: their place, themselves, and whether the line before was blank.

    The first line of a file has a blank one before it.
    """
    place, blank = start, True
    if start:
        before = _line_before(file, start)
        if not before.endswith(b"\n"):
            rest = file.readline()
            before, place = before + rest, start + len(rest)
        blank = not before.strip()
    for line in file:
        yield place, line, blank
        place, blank = place + len(line), not line.strip()


def _decoded(line: bytes, counts: Counter) -> str:
    """A line as text; nothing if it is not UTF-8, which is counted."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        counts["lines that are not UTF-8"] += 1
        return ""


def _texts(piece: Piece, documents: str, counts: Counter) -> Iterator[str]:
    """The documents of a .txt file; without its byte order mark."""
    ranged = not piece.compression and documents != "file"
    with _opened(piece) as file:
        gathered: list[str] = []
        begun = False  # a document of this piece
        for place, line, after_blank in _lines(file, piece.start):
            starts = (after_blank and line.strip()) if documents == "blank-line" else documents == "line" or not place
            if starts:
                if gathered:
                    yield "".join(gathered)
                    gathered = []
                if ranged and place >= piece.stop:
                    return
                begun = True
            if begun:
                gathered.append(_decoded(line.removeprefix(codecs.BOM_UTF8) if not place else line, counts))
        if gathered:
            yield "".join(gathered)


def _json_rows(piece: Piece, counts: Counter) -> Iterator[dict]:
    """The objects of a file of JSON lines."""
    found = 0
    with _opened(piece) as file:
        for place, line, _ in _lines(file, piece.start):
            if not piece.compression and place >= piece.stop:
                break
            line = line.removeprefix(codecs.BOM_UTF8) if not place else line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                counts["lines that are not UTF-8"] += 1
                continue
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                found += 1
                yield row
                continue
            counts["lines that are no JSON object"] += 1
            if not found and counts["lines that are no JSON object"] == WRONG_LINES:
                raise InputError(
                    f"{piece.path}: its first {WRONG_LINES} lines are no JSON objects; JSON lines have one object a line"
                )


def _table_rows(piece: Piece, reading: Reading) -> Iterator[dict]:
    """The rows of a parquet or Arrow file, or of a shard of a hub data set."""
    import datasets
    import pyarrow

    try:
        if piece.kind == "hub":
            rows = _hub(piece.path, reading).shard(num_shards=piece.stop, index=piece.start)
        else:
            rows = datasets.load_dataset(piece.kind, data_files=[piece.path], split="train", streaming=True)
        columns = rows.column_names
        if columns is not None:  # the others are not decoded
            rows = rows.select_columns([reading.column]) if reading.column in columns else rows.take(1)
        for batch in rows.iter(batch_size=ROWS_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DamagedError(str(error)) from error
