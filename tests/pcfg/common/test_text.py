"""Text shards and labelled CSV files."""

import errno
import os

import numpy as np
import pytest

from pcfg.common.files import InputError, sha256
from pcfg.common.text import (
    CACHE_BYTES,
    read_labelled,
    read_texts,
    shard_name,
    shard_paths,
    text_blocks,
    write_labelled,
    write_shard,
)


def test_blank_lines_and_line_endings_of_a_text_file_do_not_count(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa b\r\n\r\n\n  c d  \n\n\ne\u2028f".encode())
    assert read_texts(path) == ["a b", "c d", "e\u2028f"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_text_file_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="a.txt: no sentences"):
        read_texts(tmp_path / "a.txt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_texts(tmp_path)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\nna\xefve\n")
    with pytest.raises(InputError, match=r"a\.txt:3: not UTF-8 \(byte 0xef\)"):
        read_texts(tmp_path / "a.txt")


def test_the_byte_order_mark_does_not_move_the_place_of_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffine\xff\n")
    for read in (read_texts, lambda path: list(text_blocks(path))):
        with pytest.raises(InputError, match=r"a\.txt:1: not UTF-8 \(byte 0xff\)"):
            read(tmp_path / "a.txt")


@pytest.mark.parametrize("size", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("content", ["a b\n\nc\n", "\ufeffa\r\n\r\nb", "\n\u00e9\u00e9\u00e9 \u2028\n\nlong " + "x" * 50, "a"])
def test_blocks_are_the_file_cut_at_line_ends(tmp_path, content, size):
    path = tmp_path / "a.txt"
    path.write_text(content, newline="")
    blocks = list(text_blocks(path, size))
    assert b"".join(blocks).decode() == content.removeprefix("\ufeff")
    assert all(block.endswith(b"\n") for block in blocks[:-1])
    assert all(len(block[: block.rfind(b"\n", 0, -1) + 1]) < size for block in blocks)  # no line more than needed
    lines = [line.strip() for block in blocks for line in block.decode().split("\n")]
    assert [line for line in lines if line] == read_texts(path)


def test_blocks_of_a_csv_file_have_one_sentence_a_line(tmp_path):
    write_labelled(tmp_path / "a.csv", ["a  b", "c\nd"], [0, 1])
    assert b"".join(text_blocks(tmp_path / "a.csv")) == b"a b\nc d\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: no sentences"),
        ("\n \u3000\n\n\n".encode(), "a.txt: no sentences"),
        (b"fine\n" * 9 + b"na\xefve\n", r"a\.txt:10: not UTF-8 \(byte 0xef\)"),
    ],
)
def test_faulty_text_is_refused_block_by_block_too(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for size in (1, 12, 1000):
        with pytest.raises(InputError, match=message):
            list(text_blocks(path, size))


def test_blocks_of_a_missing_file_and_of_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(text_blocks(tmp_path / "a.txt"))
    with pytest.raises(InputError, match="is a folder"):
        list(text_blocks(tmp_path))


def test_labelled_sentences_come_back(tmp_path):
    texts, labels = ["a b", 'say "a", b', "c"], [3, 0, 12]
    write_labelled(tmp_path / "a.csv", texts, labels)
    assert read_labelled(tmp_path / "a.csv") == (texts, labels)
    assert read_texts(tmp_path / "a.csv") == texts
    assert (tmp_path / "a.csv").read_bytes() == b'text,label\na b,3\n"say ""a"", b",0\nc,12\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence,label\na,1\n", "a.csv:1: no column 'text'"),
        ("text\na\n", "a.csv:1: no column 'label'"),
        ("", "a.csv:1: no column 'text'"),
        ("text,label\n", "a.csv: no sentences"),
        ("text,label\na,1\nb,x\n", "a.csv:3: label 'x'"),
        ("text,label\na,-1\n", "a.csv:2: label '-1'"),
        ("text,label\na,1.0\n", "a.csv:2: label '1.0'"),
        ("text,label\na,9223372036854775808\n", "a.csv:2: label '9223372036854775808'.* at most 9 digits; number the classes"),
        ("text,label\na,1\nb\n", "a.csv:3: empty 'label'"),
        ("text,label\n ,1\n", "a.csv:2: empty 'text'"),
        ('text,label\n"a,1\nb,2\n', "not a CSV file"),
    ],
)
def test_faulty_labelled_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_labelled(tmp_path / "a.csv")


def test_shards_come_in_the_order_of_their_numbers_and_nothing_else_is_one(tmp_path):
    others = ["training.txt", "training01.txt", "training1.txt.old", ".training1.txt.tmp", "test3.txt", "atraining1.txt"]
    for name in [shard_name("training", number) for number in (10, 2, 0)] + others:
        (tmp_path / name).touch()
    assert [path.name for path in shard_paths(tmp_path, "training")] == ["training0.txt", "training2.txt", "training10.txt"]
    assert [path.name for path in shard_paths(tmp_path, "test")] == ["test3.txt"]
    with pytest.raises(InputError, match="no such folder"):
        shard_paths(tmp_path / "absent", "training")
    with pytest.raises(ValueError, match="validation"):
        shard_name("validation", 0)


def test_blocks_of_a_shard_are_parted_by_an_empty_line_and_a_failure_leaves_nothing(tmp_path):
    write_shard(tmp_path / "training0.txt", [b"a\n\nb\n", b"c\n"])
    assert (tmp_path / "training0.txt").read_bytes() == b"a\n\nb\n\nc\n"

    def failing():
        yield b"a\n"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path / "training1.txt", failing())
    assert [path.name for path in tmp_path.iterdir()] == ["training0.txt"]


@pytest.mark.parametrize("has_advice", [True, False])
@pytest.mark.parametrize("total", [1, 4096, CACHE_BYTES - 1, CACHE_BYTES + 1, 3 * CACHE_BYTES + 777])
def test_a_shard_has_what_was_written_with_and_without_advice_to_the_cache(tmp_path, monkeypatch, total, has_advice):
    rng = np.random.default_rng(total)
    content = rng.bytes(total)
    cuts = np.unique(rng.integers(0, total + 1, size=7))
    blocks = [memoryview(part) for part in np.split(np.frombuffer(content, np.uint8), cuts)]
    if not has_advice:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    (tmp_path / "training0.txt").write_bytes(b"older and longer" * 1000)
    facts = write_shard(tmp_path / "training0.txt", blocks)
    expected = b"\n".join(bytes(block) for block in blocks)
    assert (tmp_path / "training0.txt").read_bytes() == expected
    assert facts == {"size": len(expected), "sha256": sha256(tmp_path / "training0.txt")}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_and_other_errors_leave_no_shard(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    error, message = (InputError, "the disk is full") if code == errno.ENOSPC else (OSError, os.strerror(code))
    with pytest.raises(error, match=message):
        write_shard(tmp_path / "training0.txt", [b"a\n"])
    assert not list(tmp_path.iterdir())
