"""Documents of a corpus and their sentences: local files in several formats, or a data set of the hub, in parallel pieces.

Text and JSON lines are read here, line by line, because the readers of `datasets` stop at the first line that is not UTF-8 or
not JSON; such lines are dropped and counted. pyarrow reads Parquet and Arrow, `datasets` the hub, streaming. Nothing that
comes with a data set is executed. Wikimedia's sentencex splits the normalised text of a document into sentences.
"""

import codecs
import collections
import contextlib
import dataclasses
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
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
METADATA_BYTES = 1 << 24  # of a larger JSON file nobody asks whether it is metadata
ROWS_PER_BATCH = 256
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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


Patterns = Sequence[str]  # of `fnmatch`


def find_pieces(dataset: str, reading: Reading, include: Patterns = (), exclude: Patterns = ()) -> tuple[list[Piece], list]:
    """The pieces of the corpus --dataset, and what identifies it; `include` and `exclude` as in `find_files`."""
    path = Path(dataset)
    if not path.exists():
        if include or exclude:
            raise InputError(f"--include and --exclude: only for a folder; there is no {dataset}")
        return hub_pieces(dataset, reading), [dataset, reading.config_name, reading.split, reading.revision]
    files = find_files(path, reading.text_column, include, exclude)
    return local_pieces(files, reading), [identity(file, path) for file in files]


def find_files(path: Path, text_column: str = "text", include: Patterns = (), exclude: Patterns = ()) -> list[Path]:
    """The files of the corpus at `path`, by name: the file itself, or all supported files in the folder and below.

    Links are followed, and each file is read once. What is left out is printed: files of other kinds, JSON files of metadata,
    links to nothing and to what is read anyway, and what can't be read.

    Args:
        include, exclude: patterns for paths relative to the folder. Only files of `include`, if there are any
            patterns, and none of `exclude`; a JSON file of metadata is read if a pattern of `include` fits it.
    """
    supported = ", ".join(KINDS) + "; .txt and .jsonl also with .gz or .zst"
    if path.is_file():
        if not _format(path)[0]:
            raise InputError(f"--dataset {path}: can't tell what it is from its name; supported are {supported}")
        return [path]
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    files: dict[Path, Path] = {}  # by the real path
    for file in sorted(_walk(path, left_out)):
        name = file.relative_to(path).as_posix()
        is_named = any(fnmatch.fnmatch(name, pattern) for pattern in include)
        if not file.exists():
            left_out["links to nothing"].append(name)
        elif (include and not is_named) or any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
            left_out["not asked for by --include and --exclude"].append(name)
        elif not _format(file)[0]:
            left_out["of other kinds"].append(name)
        elif not os.access(file, os.R_OK):
            left_out["not readable"].append(name)
        elif not is_named and _is_metadata(file, text_column):
            left_out[f"metadata, one JSON object without {text_column!r}"].append(name)
        elif file.resolve() in files:
            left_out["links to a file that is read"].append(name)
        else:
            files[file.resolve()] = file
    summary = [f"{len(names):,} {reason} ({names[0]} first)" for reason, names in left_out.items()]
    if not files:
        reasons = f": {'; '.join(summary)}" if summary else ", the folder is empty"
        raise InputError(f"--dataset {path}: no file of a supported kind ({supported}){reasons}")
    for line in summary:
        print(f"{path}: left out: {line}")
    return list(files.values())


def _walk(root: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """All files below a folder but hidden ones, through links; each real folder once, since links can form a circle."""

    def unreadable(error: OSError) -> None:
        left_out["folders that can't be read"].append(str(error.filename))

    visited = {root.resolve()}
    for parent, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        for name in sorted(folders):
            folder = Path(parent, name)
            if folder.resolve() in visited:
                left_out["links to a folder that is read"].append(folder.relative_to(root).as_posix())
                folders.remove(name)
            visited.add(folder.resolve())
        folders.sort()  # the order in which os.walk goes on, and so which name of a folder is the first
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _is_metadata(file: Path, text_column: str) -> bool:
    """Whether a `.json` file is one JSON object without the text's column, such as `dataset_info.json`: no rows."""
    if file.suffix != ".json" or file.stat().st_size > METADATA_BYTES:
        return False
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # JSON lines are no JSON
        return False
    return isinstance(content, dict) and text_column not in content


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
        if piece.compression == ".zst":
            import pyarrow

            # Unlike the package zstandard, it detects a file that is cut short.
            with pyarrow.CompressedInputStream(pyarrow.OSFile(piece.path), "zstd") as stream:
                yield io.BufferedReader(stream, 1 << 20)
        else:
            with (gzip.open if piece.compression else open)(piece.path, "rb") as file:
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
            if not place and line.startswith(UTF16):
                raise InputError(f"{piece.path}: is UTF-16; make it UTF-8, by iconv -f UTF-16 -t UTF-8, or give --exclude")
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

    batches = _hub_batches if piece.kind == "hub" else _file_batches
    try:
        for batch in batches(piece, reading):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DamagedError(str(error)) from error


def _hub_batches(piece: Piece, reading: Reading) -> Iterator[dict[str, list]]:
    """The columns of each batch of rows; if they have the text's, that one alone."""
    rows = _hub(piece.path, reading).shard(num_shards=piece.stop, index=piece.start)
    columns = rows.column_names
    if columns is not None:  # other columns are not decoded
        rows = rows.select_columns([reading.text_column]) if reading.text_column in columns else rows.take(1)
    yield from rows.iter(batch_size=ROWS_PER_BATCH)


def _file_batches(piece: Piece, reading: Reading) -> Iterator[dict[str, list]]:
    """The same of a local file; of one without the text's column a single row."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(piece.path) as file:
        if piece.kind == "parquet":
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            columns = [reading.text_column] if reading.text_column in names else names
            batches = table.iter_batches(ROWS_PER_BATCH, columns=columns)
        else:
            try:
                batches = pyarrow.ipc.open_stream(file)
                names = batches.schema.names
            except pyarrow.ArrowInvalid:  # the other format of such files
                reader = pyarrow.ipc.open_file(file)
                names = reader.schema.names
                batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            if reading.text_column in names:
                yield {reading.text_column: batch.column(reading.text_column).to_pylist()}
            elif len(batch):
                yield batch[:1].to_pydict()
                return


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
