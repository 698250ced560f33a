"""Documents of files: every format, any ranges, and all that can be wrong with them; and their sentences."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sentencex import segment

from pcfg.common.files import InputError
from pretraining.sources.corpus.documents import (
    CHARACTERS_PER_CALL,
    DamagedError,
    Reading,
    find_files,
    hub_pieces,
    identity,
    local_pieces,
    read_documents,
    select_sentences,
    split_document,
)

TEXTS = ["One sentence. Another one.", "A second document\nof two lines.", "Ünïcödé: “naïve” 中文 😀."]


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return pyarrow.compress(content, "zstd", asbytes=True) if suffix == ".zst" else content


def write(folder, name, texts, column="text"):
    """A file of `texts` in the format of its name."""
    path = folder / name
    suffix = path.suffix if path.suffix in (".gz", ".zst") else ""
    if ".txt" in name:
        path.write_bytes(compressed("\n\n".join(texts).encode(), suffix))
    elif ".json" in name:
        lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
        path.write_bytes(compressed(lines.encode(), suffix))
    else:
        table = pyarrow.table({"id": list(range(len(texts))), column: texts})
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    return path


def read(path, counts=None, **options):
    """All documents under a path, piece after piece."""
    reading = Reading(**options)
    counts = Counter() if counts is None else counts
    return [text for piece in local_pieces(find_files(path), reading) for text in read_documents(piece, reading, counts)]


NAMES = [f"a{kind}{suffix}" for kind in (".txt", ".jsonl") for suffix in ("", ".gz", ".zst")] + [
    "a.parquet",
    "a.arrow",
    "a.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_formats(tmp_path, name):
    write(tmp_path, name, TEXTS)
    assert [text.strip("\n") for text in read(tmp_path)] == TEXTS


def test_the_other_documents_of_text_files(tmp_path):
    write(tmp_path, "a.txt", TEXTS)
    whole = "\n\n".join(TEXTS)
    assert read(tmp_path, txt_documents="file") == [whole]
    assert [line.strip() for line in read(tmp_path, txt_documents="line")] == whole.split("\n")


@pytest.mark.parametrize("seed", range(8))
def test_ranges_part_no_document(tmp_path, monkeypatch, seed):
    """A file in ranges of any size gives each document once, whatever its blank lines are."""
    rng = np.random.default_rng(seed)
    pieces = ["\n", "\n", "  \n", "\r\n", "one two\n", "three\r\n", "four \n", "five six seven\n"]
    text = ("\ufeff" if seed % 2 else "") + "".join(rng.choice(pieces, 60)) + ("eight" if seed % 3 else "")
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps({"text": f"document {i} " + "x" * int(rng.integers(20))}) + "\n" for i in range(20)))
    naive = [part.split() for part in re.split(r"\n(?:[^\S\n]*\n)+", "\n\n" + text.removeprefix("\ufeff")) if part.strip()]
    rows = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    each_line = [line.split() for line in text.removeprefix("\ufeff").removesuffix("\n").split("\n")]
    for size in (1, 2, 3, 7, 20, 1000):
        monkeypatch.setattr("pretraining.sources.corpus.documents.RANGE_BYTES", size)
        assert [document.split() for document in read(path)] == naive
        assert read(lines) == rows
        assert [line.split() for line in read(path, txt_documents="line")] == each_line


def test_what_is_no_text_is_counted(tmp_path):
    rows = [
        b'{"text": "good"}',
        b'{"text": null}',
        b'{"text": ["nested"]}',
        b'{"text": 7}',
        b'{"other": "x"}',
        b"[1]",
        b"{broken",
    ]
    rows += [b'{"text": "caf\xe9"}', b"", b'{"text": "half \\ud800 surrogate"}', b'{"text": "also good"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    counts = Counter()
    assert read(tmp_path / "a.jsonl", counts) == ["good", "half \ud800 surrogate", "also good"]
    assert counts == {
        "null": 1,
        "not a string": 2,
        "rows without the column": 1,
        "lines that are no JSON object": 2,
        "lines that are not UTF-8": 1,
    }
    (tmp_path / "b.txt").write_bytes(b"first line\nsecond \xff\xfe line\nthird line\n\nnext")
    counts.clear()
    assert [text.strip() for text in read(tmp_path / "b.txt", counts)] == ["first line\nthird line", "next"]
    assert counts == {"lines that are not UTF-8": 1}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "c.parquet")
    counts.clear()
    assert read(tmp_path / "c.parquet", counts) == ["a", "b"] and counts == {"null": 1}
    pyarrow.parquet.write_table(pyarrow.table({"text": [{"inner": "a"}]}), tmp_path / "d.parquet")
    counts.clear()
    assert read(tmp_path / "d.parquet", counts) == [] and counts == {"not a string": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_missing_column(tmp_path, name):
    path = write(tmp_path, name, TEXTS, "content")
    with pytest.raises(InputError, match=f"{path}: no column 'text'; there are 'content', 'id'; give one by --text-column"):
        read(path)
    assert read(path, text_column="content") == TEXTS


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_files_that_are_cut_short(tmp_path, name):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(10**6, size=20))) for _ in range(20_000)]
    path = write(tmp_path, name, texts)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    reading, found = Reading(), []
    (piece,) = local_pieces([path], reading)
    with pytest.raises(DamagedError):
        for text in read_documents(piece, reading, Counter()):
            found.append(text.strip())
    if name not in ("a.parquet", "a.arrow"):  # their index is at the end, or their block is the file
        assert len(found) > 1000 and found[:-1] == texts[: len(found) - 1]
    path.write_bytes(b"")
    with pytest.raises(DamagedError if name.endswith((".parquet", ".arrow")) else StopIteration):
        next(iter(read_documents(piece, reading, Counter())))


def test_what_is_no_corpus(tmp_path, capsys):
    with pytest.raises(InputError, match=r"no file of a supported kind .*the folder is empty"):
        find_files(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(InputError, match="can't tell what it is from its name"):
        find_files(tmp_path / "a.docx")
    (tmp_path / "b.parquet.gz").write_text("x")
    with pytest.raises(InputError, match=r"no file of a supported kind .*: 2 of other kinds \(a.docx first\)"):
        find_files(tmp_path)
    write(tmp_path, "c.txt", TEXTS)
    assert [file.name for file in find_files(tmp_path)] == ["c.txt"]
    assert "left out: 2 of other kinds (a.docx first)" in capsys.readouterr().out
    (tmp_path / "d.jsonl").write_text("no JSON at all\n" * 200)
    with pytest.raises(InputError, match=r"d.jsonl: its first 100 lines are no JSON objects"):
        read(tmp_path / "d.jsonl")
    with pytest.raises(InputError, match="--dataset openwebtext: no such file or folder, and the hub is off"):
        hub_pieces("openwebtext", Reading())


def test_links_are_followed_and_each_file_is_read_once(tmp_path, capsys):
    """The real folder lies outside the corpus, which has it twice, with a link to nothing and one to the corpus itself."""
    real = tmp_path / "real"
    corpus = tmp_path / "corpus"
    (real / "deep").mkdir(parents=True)
    corpus.mkdir()
    write(real, "a.txt", TEXTS)
    write(real / "deep", "b.jsonl", TEXTS)
    write(corpus, "own.txt", TEXTS)
    (corpus / "first").symlink_to(real)
    (corpus / "second").symlink_to(real)
    (corpus / "copy.txt").symlink_to(corpus / "own.txt")
    (corpus / "gone.txt").symlink_to(tmp_path / "nothing")
    (real / "deep" / "up").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus)
    names = [file.relative_to(corpus).as_posix() for file in find_files(corpus)]
    assert names == ["copy.txt", "first/a.txt", "first/deep/b.jsonl"]
    out = capsys.readouterr().out
    assert "1 links to nothing (gone.txt first)" in out
    assert "1 links to a file that is read (own.txt first)" in out
    assert "3 links to a folder that is read (second first)" in out
    assert len(read(corpus)) == 3 * len(TEXTS)


def test_files_of_metadata_are_no_corpus(tmp_path, capsys):
    write(tmp_path, "a.txt", TEXTS)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"splits": {"train": 3}}, indent=2))
    (tmp_path / "state.json").write_text(json.dumps({"_fingerprint": "0"}))
    write(tmp_path, "rows.json", TEXTS)
    write(tmp_path, "one.json", TEXTS[:1])  # a single row is no metadata
    assert [file.name for file in find_files(tmp_path)] == ["a.txt", "one.json", "rows.json"]
    assert "2 metadata, one JSON object without 'text' (dataset_info.json first)" in capsys.readouterr().out
    assert [file.name for file in find_files(tmp_path, include=["*.json"])] == [
        *("dataset_info.json", "one.json", "rows.json", "state.json"),
    ]
    assert [file.name for file in find_files(tmp_path, exclude=["*.json"])] == ["a.txt"]
    assert [file.name for file in find_files(tmp_path, include=["*.json"], exclude=["[ds]*"])] == ["one.json", "rows.json"]
    with pytest.raises(InputError, match=r"no file of a supported kind .*5 not asked for by --include and --exclude"):
        find_files(tmp_path, include=["*.parquet"])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_without_rows_is_not_damaged(tmp_path, name):
    write(tmp_path, name, [])
    counts = Counter()
    assert read(tmp_path, counts) == [] and not counts


def test_the_file_format_of_arrow(tmp_path):
    table = pyarrow.table({"text": TEXTS, "id": [0, 1, 2]})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path) == TEXTS


def test_utf16_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("A line of ASCII.\n" * 3, encoding="utf-16")
    with pytest.raises(InputError, match=r"a.txt: is UTF-16; make it UTF-8"):
        read(tmp_path)


def test_identity(tmp_path):
    """The same wherever the folder lies, another for other bytes."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    same = [identity(write(tmp_path / folder, "a.txt", TEXTS), tmp_path / folder) for folder in "xy"]
    assert same[0] == same[1]
    assert identity(write(tmp_path / "x", "a.txt", TEXTS[:2]), tmp_path / "x") != same[0]


def test_sentences_of_a_document():
    text = "Dr. Smith paid $3.50 to Mr. Jones. He\nleft!\r\n\r\nA  new\tparagraph without an end\n \nThe last one"
    expected = [
        "Dr. Smith paid $3.50 to Mr. Jones.",
        "He left!",
        "A new paragraph without an end",
        "The last one",
    ]
    assert split_document(text, Reading(), Counter()) == expected


@pytest.mark.parametrize(("form", "expected"), [("NFC", "café ﬁ²"), ("NFKC", "café fi2"), ("none", "cafe\u0301 ﬁ²")])
def test_normal_forms(form, expected):
    text = "\ufeffca\u200bfe\u0301\x00 \ufb01\u00ad\u00b2 \ud800\u2028"
    assert split_document(text, Reading(unicode=form), Counter()) == [expected]


def test_short_and_long_ones():
    counts = Counter()
    long = " ".join(["word"] * 3000)  # 14,999 characters, without an end
    lines = ["Short one.", "", "This one is long enough.", long, "x" * 25_000]
    found = select_sentences(lines, Reading(min_words=4), counts)
    assert counts == {"sentences that are too short": 2, "sentences that were cut": 1}
    assert found[0] == lines[2] and " ".join(found[1:]) == long and max(map(len, found)) <= 10_000
    found = select_sentences(["x" * 25_000], Reading(), counts)
    assert [len(part) for part in found] == [10_000, 10_000, 5_000]


def test_long_paragraphs():
    """Given to the splitter in parts, they come out as whole, and nothing is lost where a sentence has no end."""
    text = "".join(f"Sentence {i} of Mr. Smith has words (and more of them). He said so! " for i in range(500)).strip()
    assert len(text) > 6 * CHARACTERS_PER_CALL
    assert split_document(text, Reading(), Counter()) == [line.strip() for line in segment("en", text)]
    for odd in ("words without an end " * 3000, "中文句子。" * 3000, "x" * 20_000, "(see (this) " * 3000):
        found = split_document(odd, Reading(), Counter())
        assert "".join(found).replace(" ", "") == odd.replace(" ", "")


def test_no_language():
    with pytest.raises(InputError, match="--language English"):
        Reading(language="English")
