"""Writing HDF5 files that are complete or absent, on a disk that may be full.

The HDF5 library does not survive a failed write: h5py raises while the file is being closed, keeps it open, and the
interpreter crashes when it ends. So the library gets a Python file that keeps the first failure to itself, and
`atomic_hdf5` raises it once the library is done.
"""

import contextlib
import io
import os
from collections.abc import Iterator

import h5py

from pcfg.artefacts import atomic_path, check_space


class _Disk(io.FileIO):
    """A file on disk as the HDF5 library sees it: writing never fails, and `check` raises what failed."""

    def __init__(self, path):
        super().__init__(path, "w+")
        self._failure = None

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        with self._kept():
            while rest:  # a nearly full disk takes a part of what it is given
                rest = rest[os.write(self.fileno(), rest) :]
        return len(data)

    def truncate(self, size: int) -> int:
        with self._kept():
            super().truncate(size)
        return size

    @contextlib.contextmanager
    def _kept(self):
        try:
            yield
        except OSError as error:
            self._failure = self._failure or error

    def check(self) -> None:
        if self._failure:
            raise self._failure


class _File(h5py.File):
    """An HDF5 file whose `flush` raises what failed so far."""

    def __init__(self, disk: _Disk):
        super().__init__(disk, "w")
        self._disk = disk

    def flush(self) -> None:
        super().flush()
        self._disk.check()


@contextlib.contextmanager
def atomic_hdf5(path, size: int = 0) -> Iterator[h5py.File]:
    """Yield an empty HDF5 file to fill; `path` appears, complete, when the block ends, and never after an exception.

    Args:
        path: the file.
        size: bytes that it will take, where they are known before; what takes long to fill should also call `flush()` now
            and then, which raises what could not be written.

    Raises:
        InputError: the disk has not `size` bytes free, or it is full, or `path` can't be written.
    """
    with atomic_path(path) as temporary, _Disk(temporary) as disk:
        check_space(path, size)
        try:
            with _File(disk) as file:
                yield file
        finally:
            disk.check()
