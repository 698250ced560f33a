"""One run at a time in the folder of a job."""

import contextlib
import datetime
import errno
import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pcfg.common.files import InputError, disk_errors

LOCK_FILE = ".lock"
WAIT = 60.0  # seconds for the end of a run that is being killed
POLL = 0.1  # seconds between two tries
TAKEN = (errno.EAGAIN, errno.EACCES)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say that have none


@contextlib.contextmanager
def lock(job: Path) -> Iterator[None]:
    """Hold the folder `job`; folders that had to be made for it, and got no other file, are removed again.

    The lock (POSIX, `fcntl.lockf`) belongs to this process: it ends with it, however that ends, and neither children nor
    programs that it starts have it. It holds between machines where their file system passes locks on. The file names the
    holder.

    Raises:
        InputError: another process still holds the folder after `WAIT` seconds; the message names it.
    """
    made = [folder for folder in (job, *job.parents) if not folder.exists()]
    with disk_errors(job):
        file = _acquire(job)
        words = shlex.join([sys.executable, *sys.argv])
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}: {words}")
        file.flush()
    try:
        yield
    finally:
        (job / LOCK_FILE).unlink(missing_ok=True)
        file.close()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(job: Path) -> IO[str]:
    """The open file of the lock, in the folder made for it, once this process holds it."""
    path = job / LOCK_FILE
    deadline = None
    while True:
        try:
            job.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        except FileNotFoundError:  # another run, which ends, has removed a folder in between
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                print(
                    f"warning: {path}: no locks on this file system; two runs there at a time would damage each other",
                    flush=True,
                )
                return file
            if error.errno not in TAKEN:
                raise
            file.seek(0)
            holder = file.read() or "a process that does not say its name"
            if deadline is None:
                deadline = time.monotonic() + WAIT
                print(f"{job}: in use by {holder}; waiting {WAIT:.0f} s for its end", flush=True)
            if time.monotonic() > deadline:
                raise InputError(f"{job}: in use by {holder}; wait for its end, or give another --job_name") from None
            time.sleep(POLL)
        else:
            # The last holder removes its file, and this one may have been opened before.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        file.close()
