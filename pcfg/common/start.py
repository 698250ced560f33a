"""Imported first by every program: Ctrl-C while its libraries are imported, which takes seconds, ends it with one line.

Also the time that torch's threads spin between two operations before they sleep, which is read when torch is loaded. Spinning
threads that share a core with another busy process wait for each other: by default up to 80 times longer.
"""

import os
import signal

INTERRUPTED = "interrupted; run the same command again to resume"
SPINS = "1000"

if "OMP_WAIT_POLICY" not in os.environ:  # a user's own settings win
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _end(number: int, _: object) -> None:
    # No exception: libraries turn one that comes while they are imported into others, or lose it.
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a shell's background job
    signal.signal(signal.SIGINT, _end)
