"""An array that takes long to compute, kept on the disk while it grows: a kill loses what came in the last seconds."""

import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np

from pcfg.common.files import InputError, disk_errors, read_json, write_json

FORMAT = "partial array, 1"
# Between two writings to the disk.
SECONDS = 20.0


class PartialArray:
    """A float64 array of known length that is filled from its beginning to its end, in a folder of its own.

    The folder has the numbers, `values`, and `progress.json`: what they are of, how many are sure to be on the disk, and
    their CRC-32. What lies beyond these is forgotten. To be used in a `with`, which writes at its end what is there, also when
    it ends by an exception.

    Args:
        folder: made if missing.
        made_from: what decides the numbers, as plain values.
        length: of the array.
        overwrite: begin anew in a folder of something else, instead of refusing.

    Attributes:
        done: how many numbers are there.

    Raises:
        InputError: the folder holds numbers of something else, or damaged ones.
    """

    def __init__(self, folder, made_from: dict, length: int, overwrite: bool = False):
        self.folder, self.length = Path(folder), length
        self._facts = {"format": FORMAT, "made_from": made_from, "length": length}
        self._state, self._file = (0, 0), None  # numbers, CRC-32
        self._values, self._progress = self.folder / "values", self.folder / "progress.json"
        if self.folder.exists():
            self._resume(overwrite)

    def _resume(self, overwrite: bool) -> None:
        again = "remove the folder, or give --overwrite to begin anew"
        if not self._progress.is_file():
            if any(path.name not in ("values", f".{self._progress.name}.tmp") for path in self.folder.iterdir()):
                raise InputError(f"{self.folder}: not made by this script; {again}")
            return  # killed before the first writing
        found = read_json(self._progress)
        if {key: found.get(key) for key in self._facts} != self._facts:
            if not overwrite:
                raise InputError(f"{self.folder}: begun with another model, text or choice of positions; {again}")
            shutil.rmtree(self.folder)
            return
        checksum, left = 0, 8 * found["done"]
        with open(self._values, "rb") as file:
            while left and (block := file.read(min(left, 1 << 24))):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
        if left or checksum != found["crc32"]:
            raise InputError(f"{self._values}: damaged; {again}")
        self._state = found["done"], checksum

    @property
    def done(self) -> int:
        return self._state[0]

    def __enter__(self) -> "PartialArray":
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._values, "r+b" if self._values.exists() else "w+b")  # noqa: SIM115 (closed by __exit__)
            self._file.truncate(8 * self.done)
            self._file.seek(8 * self.done)
            self._write()
        return self

    def __exit__(self, *_) -> None:
        with disk_errors(self.folder), self._file:
            self._write()

    def append(self, values: np.ndarray) -> None:
        """Take in the next numbers, (n,) float64."""
        with disk_errors(self.folder):
            block = np.ascontiguousarray(values, np.float64).tobytes()
            self._file.write(block)
            # at once, so that an interruption finds both or none
            self._state = self.done + len(values), zlib.crc32(block, self._state[1])
            if time.monotonic() - self._written > SECONDS:
                self._write()

    def _write(self) -> None:
        """Bring everything to the disk, and then say so in progress.json."""
        self._file.flush()
        os.fsync(self._file.fileno())
        write_json(self._progress, {**self._facts, "done": self.done, "crc32": self._state[1]})
        self._written = time.monotonic()

    def read(self) -> np.ndarray:
        """The numbers that are there, (done,) float64, from the disk as they are asked for."""
        self._file.flush()
        return np.memmap(self._values, np.float64, "r", shape=(self.done,))
