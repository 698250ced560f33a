"""What all command lines of the project have in common: errors, argument types, parallel shards."""

import argparse
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from pcfg.artefacts import InputError


def run_main(main) -> None:
    """Run `main()`; an `InputError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def positive_int(text: str) -> int:
    """An argparse type: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def probability(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def _end_with(pipe) -> None:
    """Make a worker process end when the parent closes its end of `pipe` or is killed, before a rerun writes the same files."""

    def watch():
        multiprocessing.connection.wait([pipe])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(function, jobs: list, n_processes: int, what: str):
    """Yield `(job, function(job))` as jobs finish, on at most `n_processes` processes of this machine.

    More processes than jobs or cores are never started. `function` must be importable and a pure function of its job, so
    that the number of processes changes nothing but the time. Shows a progress bar named `what`.

    An exception of a job is raised here once the jobs in progress are done; Ctrl-C ends them at once.
    """
    workers = max(1, min(n_processes, len(jobs), os.cpu_count() or 1))
    with tqdm(total=len(jobs), desc=what, unit="file") as progress:
        if workers == 1:
            for job in jobs:
                yield job, function(job)
                progress.update()
            return
        # spawn: a forked child of a process that has threads (numba, BLAS) may deadlock.
        context = multiprocessing.get_context("spawn")
        for_workers, ours = context.Pipe(duplex=False)
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(for_workers,))
        with for_workers, ours, pool as executor:
            futures = {executor.submit(function, job): job for job in jobs}
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield futures[future], future.result()
                    progress.update()
            except concurrent.futures.process.BrokenProcessPool:
                raise InputError(
                    f"{what}: a worker process was killed, for want of memory maybe; run the same command again, "
                    "with fewer --n_processes"
                ) from None
            except (KeyboardInterrupt, GeneratorExit):
                ours.close()
                raise
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
