"""Documents of a corpus and their sentences: local files in several formats, or a data set of the hub, in parallel pieces.

Text and JSON lines are read here, line by line, because the readers of `datasets` stop at the first line that is not UTF-8 or
not JSON; such lines are dropped and counted. `datasets` reads Parquet, Arrow and the hub, streaming. Nothing that comes with a
data set is executed. Wikimedia's sentencex splits the normalised text of a document into sentences.
"""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from sentencex import segment

from pcfg.common.files import InputError
from pretraining.data.vocabulary import hub_is_off

if TYPE_CHECKING:
    import datasets

COMPRESSIONS = (".gz", ".zst")
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
RANGE_BYTES = 1 << 26  # per piece of an uncompressed file of lines
END_BYTES = 1 << 20  # read at both ends of a file for its identity
ROWS_PER_BATCH = 256
WRONG_LINES = 100  # at the beginning of a file, after which the file is not taken for JSON lines
LOOK_BACK = 1 << 16  # bytes before a range from which the line before it is read
TXT_DOCUMENTS = ("blank-line", "line", "file")
# Both data sets were loading scripts, which are no longer executed; the hub keeps their content as parquet files.
HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet"),
    "bookcorpus": ("bookcorpus/bookcorpus", "refs/convert/parquet"),
}
UNICODE_FORMS = ("NFC", "NFKC", "none")
MAX_CHARACTERS = 10_000  # per sentence; a longer one is cut
# Characters per call of the splitter: its time grows with the square of a paragraph of many brackets, or of Chinese.
CHARACTERS_PER_CALL = 1 << 12
# Control characters except white space, soft hyphens, zero-width spaces, marks of direction, the byte order mark,
# noncharacters, and half surrogates, which JSON can hold and UTF-8 can't.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff\ud800-\udfff]"
)
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")


class DamagedError(Exception):
    """A file that can't be read to its end; the reason, without the file's name."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the corpus that one job reads: a file, a range of its bytes, or a shard of a hub data set."""

    path: str  # of the file, or the name of the hub data set
    kind: str  # a value of `KINDS`, or "hub"
    compression: str  # a member of `COMPRESSIONS`, or ""
    start: int  # byte of the file; the documents that begin in start .. stop - 1 belong to the piece; of the hub: the shard
    stop: int  # of the hub: number of shards
    size: int  # bytes to read, for the progress bar; 0 if unknown


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files become documents, and documents sentences; the names are those of the flags."""

    text_column: str = "text"  # the text's column in JSON lines, parquet, Arrow and the hub
    txt_documents: str = "blank-line"  # of .txt files, a member of `TXT_DOCUMENTS`
    sentences_a_document: int = 1  # above 1: a row is one sentence, and this number of rows in order is one document
    unicode: str = "NFC"  # a member of `UNICODE_FORMS`: the normal form
    min_words: int = 1  # sentences of fewer words are dropped
    language: str = "en"  # ISO 639-1 code, for the splitter's abbreviations
    config_name: str | None = None  # of a hub data set, as are the next two
    split: str = "train"
    revision: str | None = None

    def __post_init__(self):
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise InputError(f"--language {self.language}: no ISO 639 code such as en or de")

    def clean(self, text: str) -> str:
        """The text in its normal form, without invisible characters."""
        text = INVISIBLE.sub("", text)
        return text if self.unicode == "none" else unicodedata.normalize(cast(Literal["NFC", "NFKC"], self.unicode), text)


def _format(path: Path) -> tuple[str, str]:
    """Kind and compression of a file by its name; the kind is "" if it is not supported."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = KINDS.get(Path(path.stem).suffix if compression else path.suffix, "")
    return ("" if compression and kind not in ("text", "json") else kind), compression


def find_pieces(dataset: str, reading: Reading) -> tuple[list[Piece], list]:
    """The pieces of the corpus --dataset, and what identifies it."""
    path = Path(dataset)
    if not path.exists():
        return hub_pieces(dataset, reading), [dataset, reading.config_name, reading.split, reading.revision]
    files = find_files(path)
    return local_pieces(files, reading), [identity(file, path) for file in files]


def find_files(path: Path) -> list[Path]:
    """The files of the corpus at `path`, by name: the file itself, or all supported files in the folder and below."""
    supported = ", ".join(KINDS) + "; .txt and .jsonl also with .gz or .zst"
    if path.is_file():
        if not _format(path)[0]:
            raise InputError(f"--dataset {path}: can't tell what it is from its name; supported are {supported}")
        return [path]
    every = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = [file for file in every if _format(file)[0]]
    if not files:
        raise InputError(f"--dataset {path}: none of the {len(every)} files there is of a supported kind ({supported})")
    if len(files) < len(every):
        other = next(file for file in every if not _format(file)[0])
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
    """Files in pieces; uncompressed files of lines are cut into ranges of `RANGE_BYTES`."""
    pieces = []
    for file in files:
        kind, compression = _format(file)
        size = file.stat().st_size
        is_whole = compression or kind in ("parquet", "arrow") or (kind == "text" and reading.txt_documents == "file")
        step = max(1, size) if is_whole else RANGE_BYTES
        for start in range(0, max(1, size), step):
            stop = min(start + step, size)
            pieces.append(Piece(str(file.absolute()), kind, compression, start, stop, stop - start))
    return pieces


def hub_pieces(name: str, reading: Reading) -> list[Piece]:
    """The shards of a hub data set."""
    if hub_is_off():
        raise InputError(f"--dataset {name}: no such file or folder, and the hub is off; give a path, or set HF_HUB_OFFLINE=0")
    shards = _hub(name, reading).num_shards
    return [Piece(name, "hub", "", shard, shards, 0) for shard in range(shards)]


def _hub(name: str, reading: Reading) -> "datasets.IterableDataset":
    """A hub data set, streaming."""
    import datasets

    repository, default_revision = HUB_NAMES.get(name, (name, None))
    revision = reading.revision or default_revision
    try:
        return datasets.load_dataset(repository, reading.config_name, split=reading.split, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--dataset {name}: the hub has no such data set, or it can't be loaded ({error})") from None


def read_documents(piece: Piece, reading: Reading, counts: Counter) -> Iterator[str]:
    """The texts of a piece, in order; rows and lines without text are counted in `counts` and left out.

    Raises:
        DamagedError: the file is cut short or damaged; raised after the documents before the damage.
    """
    if piece.kind == "text":
        for lines in _line_groups(piece, reading.txt_documents):
            yield "".join(_decoded(line, counts) for line in lines)
        return
    has_column = False
    other_columns: set[str] = set()
    for row in _json_rows(piece, counts) if piece.kind == "json" else _table_rows(piece, reading):
        if reading.text_column not in row:
            other_columns.update(row)
            counts["rows without the column"] += 1
            continue
        has_column = True
        value = row[reading.text_column]
        if isinstance(value, str):
            yield value
        else:
            counts["null" if value is None else "not a string"] += 1
    if other_columns and not has_column:
        names = ", ".join(map(repr, sorted(other_columns)))
        raise InputError(f"{piece.path}: no column {reading.text_column!r}; there are {names}; give one by --text-column")


@contextlib.contextmanager
def _opened(piece: Piece) -> Iterator[Any]:
    """A binary file of lines, decompressed."""
    try:
        if piece.compression == ".gz":
            with gzip.open(piece.path, "rb") as file:
                yield file
        elif piece.compression == ".zst":
            import pyarrow

            # Unlike the package zstandard, it detects a file that is cut short.
            with pyarrow.CompressedInputStream(pyarrow.OSFile(piece.path), "zstd") as stream:
                yield io.BufferedReader(stream, 1 << 20)
        else:
            with open(piece.path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{piece.path}: can't be read ({error.strerror})") from None
        raise DamagedError(str(error)) from error


def _lines(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes, bool]]:
    """The lines that begin at byte `start` or later: first byte, line, whether the line before is blank or missing."""
    place = max(0, start - LOOK_BACK)
    if place:
        file.seek(place)
    is_blank = True
    for line in file:
        if place >= start:
            yield place, line, is_blank
        place += len(line)
        is_blank = not line.strip()


def _line_groups(piece: Piece, documents: str) -> Iterator[list[bytes]]:
    """The lines of each document of a file of lines, without a byte order mark; `documents` is a member of `TXT_DOCUMENTS`."""
    is_range = not piece.compression and documents != "file"
    group: list[bytes] = []
    with _opened(piece) as file:
        for place, line, after_blank in _lines(file, piece.start):
            starts = (after_blank and line.strip()) if documents == "blank-line" else documents == "line" or not place
            if starts:
                if group:
                    yield group
                    group = []
                if is_range and place >= piece.stop:
                    return
            elif not group:
                continue  # this line belongs to a document of the piece before
            group.append(line if place else line.removeprefix(codecs.BOM_UTF8))
        if group:
            yield group


def _decoded(line: bytes, counts: Counter) -> str:
    """A line as text; empty if it is not UTF-8, which is counted."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        counts["lines that are not UTF-8"] += 1
        return ""


def _json_rows(piece: Piece, counts: Counter) -> Iterator[dict]:
    """The objects of a file of JSON lines."""
    has_rows = False
    for (line,) in _line_groups(piece, "line"):
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
            has_rows = True
            yield row
            continue
        counts["lines that are no JSON object"] += 1
        if not has_rows and counts["lines that are no JSON object"] == WRONG_LINES:
            raise InputError(
                f"{piece.path}: its first {WRONG_LINES} lines are no JSON objects; JSON lines have one object per line"
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
        if columns is not None:  # other columns are not decoded
            rows = rows.select_columns([reading.text_column]) if reading.text_column in columns else rows.take(1)
        for batch in rows.iter(batch_size=ROWS_PER_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DamagedError(str(error)) from error


def read_sentences(piece: Piece, reading: Reading, counts: Counter) -> Iterator[list[str]]:
    """The documents of a piece as lists of sentences; what was left out is added to `counts`."""
    texts = read_documents(piece, reading, counts)
    if reading.sentences_a_document == 1:
        for text in texts:
            yield split_document(text, reading, counts)
    else:
        while rows := list(itertools.islice(texts, reading.sentences_a_document)):
            yield select_sentences([" ".join(reading.clean(row).split()) for row in rows], reading, counts)


def split_document(text: str, reading: Reading, counts: Counter) -> list[str]:
    """The sentences of a document, their words separated by single spaces; dropped and cut ones are added to `counts`.

    An empty line ends a paragraph, and so a sentence; a single line end is a space.
    """
    lines: list[str] = []
    for paragraph in PARAGRAPH.split(reading.clean(text)):
        lines += _split_paragraph(" ".join(paragraph.split()), reading.language)
    return select_sentences(lines, reading, counts)


def _split_paragraph(paragraph: str, language: str) -> list[str]:
    """The sentences of a paragraph, with the space after each.

    The last sentence of a call may continue in the next `CHARACTERS_PER_CALL`, and is split again together with them.
    """
    lines = []
    rest = ""
    start = 0
    while start < len(paragraph):
        stop = start + CHARACTERS_PER_CALL
        if stop < len(paragraph):
            space = paragraph.rfind(" ", start, stop)
            stop = stop if space < 0 else space + 1
        parts = segment(language, rest + paragraph[start:stop])
        start = stop
        rest = parts.pop() if start < len(paragraph) and parts else ""
        if len(rest) > CHARACTERS_PER_CALL:
            parts.append(rest)
            rest = ""
        lines += parts
    return lines


def select_sentences(lines: list[str], reading: Reading, counts: Counter) -> list[str]:
    """The stripped lines (words separated by single spaces) that have enough words; too long ones are cut."""
    result = []
    for line in map(str.strip, lines):
        if not line:
            continue
        if line.count(" ") + 1 < reading.min_words:
            counts["sentences that are too short"] += 1
        elif len(line) > MAX_CHARACTERS:
            counts["sentences that were cut"] += 1
            result += _cut(line, MAX_CHARACTERS)
        else:
            result.append(line)
    return result


def _cut(text: str, size: int) -> list[str]:
    """Words separated by single spaces, in blocks of at most `size` characters, cut at spaces where there are any.

    >>> _cut("one two three", 8)
    ['one two', 'three']
    >>> _cut("abcdef", 4)
    ['abcd', 'ef']
    """
    blocks = []
    start = 0
    while len(text) - start > size:
        space = text.rfind(" ", start + 1, start + size + 1)
        stop = space if space > 0 else start + size
        blocks.append(text[start:stop])
        start = stop + (space > 0)
    return [*blocks, text[start:]] if start < len(text) else blocks
