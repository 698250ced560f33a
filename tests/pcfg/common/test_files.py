"""Files are complete or absent, provenance is checked, and random numbers depend on their key alone."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pcfg.common.files import (
    InputError,
    Manifest,
    atomic_folder,
    atomic_open,
    atomic_path,
    check_space,
    free_bytes,
    keyed_rng,
    read_json,
    sha256,
    versions,
    write_json,
)
from pcfg.common.text import write_shard

ROOT = Path(__file__).parents[3]


def tree(folder):
    """The content of every file below `folder`, by relative path; empty folders by a trailing slash."""
    return {
        f"{path.relative_to(folder)}{'/' * path.is_dir()}": None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or not list(path.iterdir())
    }


def write_file(path, content):
    with atomic_open(path) as file:
        file.write(content)


def write_bytes(path, content):
    with atomic_open(path, "wb") as file:
        file.write(content.encode())


def write_by_path(path, content):
    with atomic_path(path) as temporary:
        temporary.write_text(content)


def write_folder(path, content):
    with atomic_folder(path) as temporary:
        (temporary / "deeper").mkdir()
        (temporary / "deeper" / "file").write_text(content)


def content_of(path):
    return (path / "deeper" / "file" if path.is_dir() else path).read_text()


WRITERS = [write_file, write_bytes, write_by_path, write_folder]


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_written_appears_and_replaces(tmp_path, write):
    path = tmp_path / "new" / "folders" / "result"
    for content in ("first\n", "zweite Ä\n"):
        write(path, content)
        assert content_of(path) == content
        assert list(path.parent.iterdir()) == [path]


def test_nothing_has_its_name_before_the_block_ends(tmp_path):
    with atomic_open(tmp_path / "file") as file, atomic_folder(tmp_path / "folder") as folder:
        file.write("x")
        (folder / "x").touch()
        assert not (tmp_path / "file").exists() and not (tmp_path / "folder").exists()
    assert tree(tmp_path) == {"file": b"x", "folder/x": b""}


def test_line_ends_are_written_as_they_are(tmp_path):
    write_file(tmp_path / "file", "a\r\nb\n")
    assert (tmp_path / "file").read_bytes() == b"a\r\nb\n"


@pytest.mark.parametrize("exception", [ZeroDivisionError, KeyboardInterrupt, InputError])
@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("opened", [atomic_open, atomic_path, atomic_folder])
def test_an_exception_leaves_what_was_there(tmp_path, opened, before, exception):
    path = tmp_path / "result"
    if before:
        {atomic_folder: write_folder}.get(opened, write_file)(path, before)
    expected = tree(tmp_path)
    with pytest.raises(exception), opened(path) as target:
        if opened is atomic_open:
            target.write("half")
        else:
            (target / "half" if opened is atomic_folder else target).write_text("half")
        raise exception
    assert tree(tmp_path) == expected


# Writes the half of something, says so, and waits to be killed.
HALF_A_FILE = """\
import sys, time
from pcfg.common.files import atomic_open
with atomic_open(sys.argv[1]) as file:
    file.write("half")
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""
HALF_A_FOLDER = """\
import sys, time
from pcfg.common.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("script", "write"), [(HALF_A_FILE, write_file), (HALF_A_FOLDER, write_folder)])
def test_sigkill_leaves_the_old_content_and_a_rerun_clears_up(tmp_path, script, write):
    path = tmp_path / "result"
    write(path, "old")
    with subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert content_of(path) == "old"
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process left has another name
    write(path, "new")
    assert content_of(path) == "new"
    assert list(tmp_path.iterdir()) == [path]
    assert not list(tmp_path.rglob("half"))


@pytest.mark.parametrize("write", WRITERS)
def test_a_place_that_cannot_be_written_is_named(tmp_path, write):
    (tmp_path / "file").write_text("a file, no folder")
    for path in (tmp_path / "file" / "result", tmp_path / "file" / "deeper" / "result"):
        with pytest.raises(InputError, match="result: can't be written .*; choose another place"):
            write(path, "x")
    assert tree(tmp_path) == {"file": b"a file, no folder"}


@pytest.mark.parametrize("write", [write_file, write_by_path])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, write):
    (tmp_path / "result").mkdir()
    with pytest.raises(InputError, match="result: can't be written"):
        write(tmp_path / "result", "x")
    assert tree(tmp_path) == {"result/": None}


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "result").write_text("old")
    with pytest.raises(InputError, match="result: can't be written"):
        write_folder(tmp_path / "result", "x")
    assert tree(tmp_path) == {"result": b"old"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where permissions forbid it")
@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_without_permission_is_named(tmp_path, write):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="result: can't be written .Permission denied"):
        write(tmp_path / "closed" / "result", "x")


@pytest.mark.parametrize("opened", [atomic_open, atomic_path, atomic_folder])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errno.ENOSPC, "result: the disk is full: more than the 5 bytes written so far are needed; free some space"),
        (errno.EDQUOT, "result: the disk is full: more than the 5 bytes written so far are needed; free some space"),
        (errno.EACCES, "result: can't be written .Permission denied.; choose another place"),
        (errno.EROFS, "result: can't be written .Read-only"),
        (errno.EFBIG, "result: can't be written .File too large"),
    ],
)
def test_what_the_system_refuses_is_an_input_error(tmp_path, opened, error, message):
    with pytest.raises(InputError, match=message), opened(tmp_path / "result") as place:
        if opened is atomic_open:
            place.write("12345")
            place.flush()
        else:
            (place / "part" if opened is atomic_folder else place).write_text("12345")
        raise OSError(error, os.strerror(error))
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), atomic_open(tmp_path / "result"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not list(tmp_path.iterdir())


def test_a_sync_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    for write in WRITERS:
        with pytest.raises(InputError, match="disk is full"):
            write(tmp_path / "result", "x")
        assert not list(tmp_path.iterdir())


def test_space_is_that_of_the_disk_below_the_deepest_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or shutil._ntuple_diskusage(100, 40, 60))
    assert free_bytes(tmp_path / "a" / "b") == 60
    check_space(tmp_path / "a", 60)
    assert asked == [tmp_path, tmp_path]
    with pytest.raises(InputError, match=r"a: 6.1e-08 GB to write, but the disk has 6e-08 GB free; free some space"):
        check_space(tmp_path / "a", 61)
    monkeypatch.chdir(tmp_path)
    free_bytes("b")
    assert asked[-1] == tmp_path


def test_json_comes_back_and_only_json_is_written(tmp_path):
    value = {"a": [1, 2.5, None, "Ä"], "b": {"c": True}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "value.json", wrong)
    assert read_json(tmp_path / "value.json") == value


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_a_broken_json_file_is_named(tmp_path, content):
    (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(InputError, match="value.json: not a JSON file"):
        read_json(tmp_path / "value.json")
    with pytest.raises(InputError, match="missing.json: no such file"):
        read_json(tmp_path / "missing.json")


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    # FIPS 180-4's example
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_is_written_is_hashed_on_the_way(tmp_path, manifest):
    blocks = (b"", b"ab", memoryview(b"c"), np.frombuffer(b"def", dtype=np.uint8).data)
    facts = write_shard(tmp_path / "blocks", blocks)
    assert (tmp_path / "blocks").read_bytes() == b"\nab\nc\ndef"
    assert facts == {"size": 9, "sha256": sha256(tmp_path / "blocks")}
    manifest.add("blocks", **facts, words=1)
    assert Manifest.read(manifest.path).entry("blocks") == {**facts, "words": 1}
    assert manifest.is_complete("blocks")


def test_versions_of_packages():
    assert versions("numpy") == {"python": ".".join(map(str, sys.version_info[:3])), "numpy": np.__version__}


@pytest.fixture
def manifest(tmp_path):
    """A manifest of two files of 1000 and 0 bytes."""
    manifest = Manifest(tmp_path / "manifest.json", {"seed": 1, "grammar": "abc"})
    (tmp_path / "large").write_bytes(bytes(1000))
    (tmp_path / "empty").touch()
    manifest.add("large", sentences=3)
    manifest.add("empty")
    return manifest


def test_a_manifest_comes_back(manifest):
    for found in (Manifest(manifest.path, {"seed": 1, "grammar": "abc"}), Manifest.read(manifest.path)):
        assert found.names() == ["empty", "large"]
        assert found.entry("large") == {"size": 1000, "sha256": sha256(manifest.path.parent / "large"), "sentences": 3}
        assert found.is_complete("large") and found.is_complete("empty") and not found.is_complete("other")
        assert found.content["versions"] == versions("numpy", "numba")
    with pytest.raises(InputError, match="none.json: no such file"):
        Manifest.read(manifest.path.with_name("none.json"))


def spoil_byte(path):
    path.write_bytes(bytes(500) + b"\x01" + bytes(499))


def spoil_length(path):
    path.write_bytes(bytes(999))


def spoil_kind(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [spoil_byte, spoil_length, spoil_kind, Path.unlink])
def test_a_changed_file_is_not_complete(manifest, spoil):
    spoil(manifest.path.parent / "large")
    again = Manifest.read(manifest.path)
    assert not again.is_complete("large") and again.is_complete("empty")


def test_what_was_made_otherwise_is_refused_and_named(manifest):
    before = manifest.path.read_bytes()
    with pytest.raises(InputError) as refused:
        Manifest(manifest.path, {"seed": 2, "grammar": "abc", "words": 5})
    assert "manifest.json: the files here were made otherwise" in str(refused.value)
    assert "(seed was 1, now 2, words was None, now 5)" in str(refused.value)
    assert "--overwrite" in str(refused.value) and "grammar" not in str(refused.value)
    assert manifest.path.read_bytes() == before


def test_overwrite_forgets_what_was_made_otherwise_and_nothing_else(manifest):
    assert Manifest(manifest.path, {"seed": 1, "grammar": "abc"}, overwrite=True).names() == ["empty", "large"]
    other = Manifest(manifest.path, {"seed": 2, "grammar": "abc"}, overwrite=True)
    assert other.names() == [] and not other.is_complete("large")
    assert Manifest.read(manifest.path).names() == ["empty", "large"]  # on disk until the first new file is there
    other.add("empty")
    found = json.loads(manifest.path.read_text())
    assert found["made_from"] == {"seed": 2, "grammar": "abc"} and list(found["files"]) == ["empty"]


def test_a_manifest_without_a_product_binds_nobody(tmp_path):
    """A run was killed after its tokenizer, before its first shard; another one with other flags replaces it."""
    (tmp_path / "vocab.txt").write_text("x")
    first = Manifest(tmp_path / "manifest.json", {"length": 9}, products="*.hdf5")
    first.add("vocab.txt")
    second = Manifest(tmp_path / "manifest.json", {"length": 10}, products="*.hdf5")
    assert second.names() == [] and second.forgotten == {"vocab.txt"}
    (tmp_path / "a.hdf5").write_text("y")
    second.add("a.hdf5")
    with pytest.raises(InputError, match="length was 10, now 9"):
        Manifest(tmp_path / "manifest.json", {"length": 9}, products="*.hdf5")


def test_a_refused_run_leaves_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "new" / "deep"
    manifest = Manifest(folder / "manifest.json", {}, products="*.hdf5")
    for kept in ([], ["own.txt", "sub/own.txt"]):  # files that were there before
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine")
        with pytest.raises(InputError, match="refused"), manifest.or_nothing():
            (folder / "tokenizer").mkdir(parents=True)
            (folder / "tokenizer" / "vocab.txt").write_text("x")
            manifest.add("tokenizer/vocab.txt")
            raise InputError("refused")
        assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == kept
        assert folder.exists() == bool(kept) and (tmp_path / "new").exists() == bool(kept)
    with pytest.raises(InputError, match="refused"), manifest.or_nothing():
        (folder / "a.hdf5").write_text("y")
        manifest.add("a.hdf5")
        raise InputError("refused")
    assert (folder / "a.hdf5").exists() and manifest.path.exists()  # finished work stays


def test_a_file_that_is_made_again_is_complete_again(manifest):
    (manifest.path.parent / "large").write_text("new")
    manifest.add("large", sentences=1)
    assert Manifest.read(manifest.path).entry("large")["sentences"] == 1
    assert Manifest.read(manifest.path).is_complete("large")


def test_the_same_key_gives_the_same_numbers_in_every_process():
    expected = keyed_rng(3, "training", 2).integers(1 << 62, size=4).tolist()
    code = "from pcfg.common.files import keyed_rng; print(keyed_rng(3, 'training', 2).integers(1 << 62, size=4).tolist())"
    for seed in ("0", "1"):  # of Python's own hashes, which differ between processes
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert json.loads(done.stdout) == expected


def test_the_numbers_of_a_key_never_change():
    """Data that was made with an earlier version must come out the same: these are the numbers of the first one."""
    assert keyed_rng(0, "training", 3).integers(1000, size=5).tolist() == [553, 517, 849, 113, 763]


def test_streams_of_different_keys_are_independent():
    keys = [(seed, purpose, index) for seed in range(4) for purpose in ("training", "test") for index in range(8)]
    drawn = np.array([keyed_rng(seed, purpose, index).standard_normal(4000) for seed, purpose, index in keys])
    correlation = np.corrcoef(drawn)[np.triu_indices(len(keys), 1)]  # 2016 pairs, standard error 1 / sqrt(4000) each
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert np.std(correlation) == pytest.approx(1 / np.sqrt(4000), rel=0.1)


def test_every_part_of_a_key_counts():
    seeds, numbers = (0, 1, 2**40), (0, 1, 2, 2**40)
    keys = [(seed, purpose) for seed in seeds for purpose in "ab"]
    keys += [(*key, i, j) for key in keys for i in numbers for j in numbers]
    assert len({int(keyed_rng(*key).integers(1 << 62)) for key in keys}) == len(keys)


def test_what_is_no_object_is_refused(tmp_path):
    (tmp_path / "value.json").write_text("[1]")
    with pytest.raises(InputError, match="value.json: holds no JSON object, but list"):
        read_json(tmp_path / "value.json")
