"""Writing large files past the page cache.

Text shards are tens of gigabytes that nobody reads again soon. Through the cache, the kernel copies them page by page, pushes
out of memory what others use, and has the disk wait until a file is synced; direct writes keep the disk busy all the time.
"""

import errno
import mmap
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BUFFER_BYTES = 4 << 20
# Direct writes are whole blocks of the disk from aligned memory; 4096 serves all disks that are sold.
BLOCK_BYTES = 4096
# The flag of direct writes, 0 where the system has none.
DIRECT = getattr(os, "O_DIRECT", 0) if fcntl else 0


def _set_direct(descriptor: int, flag: int) -> bool:
    """Turn direct writes of an open file on (DIRECT) or off (0); whether they are on then."""
    if not DIRECT:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT | flag)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return flag != 0


class DirectWriter:
    """A new binary file that is written once from its beginning to its end; a context manager.

    Where the system or the file system has no direct writes, the file is written through the page cache.

    Args:
        path: the file; what is there is replaced.
    """

    def __init__(self, path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._is_direct = _set_direct(self._descriptor, DIRECT)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # of whole pages
        self._used = self._size = 0

    def write(self, block) -> None:
        """Append bytes, or what has their buffer."""
        view = memoryview(block).cast("B")
        self._size += len(view)
        while len(view):
            part = min(len(view), BUFFER_BYTES - self._used)
            self._buffer[self._used : self._used + part] = view[:part]
            self._used += part
            view = view[part:]
            if self._used == BUFFER_BYTES:
                self._flush(BUFFER_BYTES)

    def _flush(self, size: int) -> None:
        with memoryview(self._buffer) as buffer:
            written = 0
            while written < size:
                try:
                    written += os.write(self._descriptor, buffer[written:size])
                except OSError as error:
                    # Some file systems open a file for direct writes and then refuse them.
                    if error.errno != errno.EINVAL or not self._is_direct:
                        raise
                    self._is_direct = _set_direct(self._descriptor, 0)
        self._used = 0

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                # The last block is filled up, and what is too much is cut off.
                self._flush(-(-self._used // BLOCK_BYTES) * BLOCK_BYTES)
                os.ftruncate(self._descriptor, self._size)
        finally:
            os.close(self._descriptor)
