"""Imported first by every program: Ctrl-C while its libraries are imported, which takes seconds, ends it with one line."""

import os
import signal

INTERRUPTED = "interrupted; run the same command again to resume"


def _end(number: int, _: object) -> None:
    # No exception: libraries turn one that comes while they are imported into others, or lose it.
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a shell's background job
    signal.signal(signal.SIGINT, _end)
