"""HDF5 files on a disk that refuses: one error, no file left, and an interpreter that still ends as it should."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pcfg.artefacts import InputError
from pcfg.hdf5 import atomic_hdf5

ROOT = Path(__file__).parents[2]

# A real disk that is full needs root; a limit on the size of files makes the system refuse the same writes.
WRITER = """\
import resource, sys
import numpy as np
from pcfg.cli import run_main
from pcfg.hdf5 import atomic_hdf5

def main():
    path, limit, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    values = np.random.default_rng(0).integers(1 << 30, size=(20_000, 8))
    with atomic_hdf5(path) as file:
        if kind == "rows":
            dataset = file.create_dataset("values", values.shape, values.dtype)
            for first in range(0, len(values), 100):
                dataset[first : first + 100] = values[first : first + 100]
        else:
            file.create_dataset("values", data=values, chunks=(4096, 8), compression="gzip", shuffle=True)
        file.attrs["kind"] = kind

run_main(main)
"""


@pytest.mark.parametrize("kind", ["rows", "chunks"])
@pytest.mark.parametrize("limit", [1, 5_000, 300_000])
def test_a_refused_write_is_one_error_without_a_file(tmp_path, limit, kind):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "values.hdf5"), str(limit), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "values.hdf5: can't be written (File too large)" in done.stderr
    assert not list(tmp_path.iterdir())


def refuse_after(monkeypatch, number, error):
    """Let the system refuse all writes to files after the first `number`; a write before takes half of what it is given."""
    calls, write = [], os.write

    def refusing(descriptor, data):
        calls.append(len(data))
        if len(calls) > number:
            raise OSError(error, "refused")
        return write(descriptor, data[: len(data) // 2 + 1])

    monkeypatch.setattr(os, "write", refusing)
    return calls


@pytest.mark.parametrize(
    ("error", "message"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "can't be written")]
)
@pytest.mark.parametrize("number", [0, 3])
def test_what_the_system_refuses_is_named(tmp_path, monkeypatch, number, error, message):
    refuse_after(monkeypatch, number, error)
    (tmp_path / "values.hdf5").write_text("old")
    with pytest.raises(InputError, match=f"values.hdf5: .*{message}"), atomic_hdf5(tmp_path / "values.hdf5") as file:
        file["values"] = np.arange(100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["values.hdf5"]
    assert (tmp_path / "values.hdf5").read_text() == "old"


def test_flush_raises_what_was_refused(tmp_path, monkeypatch):
    refuse_after(monkeypatch, 0, errno.ENOSPC)
    reached = []
    with pytest.raises(InputError, match="disk is full"), atomic_hdf5(tmp_path / "values.hdf5") as file:
        file["values"] = np.arange(100_000)
        reached.append("filled")
        file.flush()
        reached.append("flushed")
    assert reached == ["filled"]


def test_writes_of_which_the_system_takes_a_part_are_completed(tmp_path, monkeypatch):
    calls = refuse_after(monkeypatch, 10**9, errno.ENOSPC)
    with atomic_hdf5(tmp_path / "values.hdf5") as file:
        file["values"] = np.arange(100_000)
    assert len(calls) > 20
    with h5py.File(tmp_path / "values.hdf5") as file:
        np.testing.assert_array_equal(file["values"][:], np.arange(100_000))


def test_content_comes_back_and_the_same_content_gives_the_same_bytes(tmp_path):
    values = np.random.default_rng(0).integers(1000, size=(9000, 7))
    for name in ("first", "second"):
        with atomic_hdf5(tmp_path / name, 10**4) as file:
            file.create_dataset("rows", values.shape, values.dtype, track_times=False)
            for first in range(0, len(values), 100):
                file["rows"][first : first + 100] = values[first : first + 100]
            file.create_dataset("chunks", data=values, chunks=(512, 7), compression="gzip", track_times=False)
            file.attrs["kind"] = "both"
            file.flush()
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    with h5py.File(tmp_path / "first") as file:
        np.testing.assert_array_equal(file["rows"][:], values)
        np.testing.assert_array_equal(file["chunks"][:], values)
        assert file.attrs["kind"] == "both"


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_hdf5(tmp_path / "values.hdf5") as file:
        file["values"] = np.arange(5) + 1 // 0
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(InputError, match=r"values.hdf5: 1e\+12 GB to write, but the disk has"):
        with atomic_hdf5(tmp_path / "values.hdf5", 10**21):
            raise AssertionError("the block was entered")
    assert not list(tmp_path.iterdir())
