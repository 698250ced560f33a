"""Jobs side by side: on processes or threads of this machine, or as Ray Core tasks, with the same results.

What a job gives is a function of the job alone, so the executor and the number of workers change the time and nothing else.
"""

import argparse
import concurrent.futures.process
import contextlib
import multiprocessing.connection
import os
import socket
import threading
import types
from collections.abc import Callable, Generator, Iterator

from tqdm import tqdm

from pcfg.common.cli import positive_int
from pcfg.common.files import InputError

# How often Ray starts a task again whose worker has died.
RAY_RETRIES = 3
CONNECT_SECONDS = 10


def add_executor_arguments(parser) -> None:
    """Add --n_processes, --executor and --ray-address to a parser or a group of it; `executor_options` reads them."""
    parser.add_argument(
        "--n_processes",
        type=positive_int,
        default=os.cpu_count() or 1,
        help="files that are worked on at once on this machine, at most one a core; changes the time and nothing else; "
        "default: the number of cores",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where files are made: on this machine, or as Ray Core tasks, one core each (`pip install ray`); default local",
    )
    parser.add_argument(
        "--ray-address",
        help="HOST:PORT of a Ray cluster, or auto; its machines must see the same folders, and its cores are how many files "
        "are worked on at once; default: Ray is started on this machine, with --n_processes",
    )


def executor_options(options: argparse.Namespace, local: str) -> dict:
    """The arguments of `run_jobs` that the flags of `add_executor_arguments` stand for; `local`: "processes" or "threads".

    Raises:
        InputError: --ray-address without --executor ray.
    """
    if options.ray_address is not None and options.executor != "ray":
        raise InputError(f"--ray-address {options.ray_address}: only --executor ray connects to a cluster; add it")
    executor = "ray" if options.executor == "ray" else local
    return {"n_processes": options.n_processes, "executor": executor, "ray_address": options.ray_address}


def run_jobs(
    function: Callable,
    jobs: list,
    n_processes: int,
    what: str,
    executor: str = "processes",
    ray_address: str | None = None,
    weight: Callable | None = None,
) -> Generator[tuple, None, None]:
    """Yield `(job, function(job))` as jobs finish, and show a progress bar named `what`.

    Args:
        function: a pure function of its job; importable, or a `functools.partial` of what is, but for threads. It is sent to
            each worker once, the jobs one by one: large things that all jobs share belong into the partial.
        n_processes: jobs at once; more than there are jobs or cores never are. A Ray cluster at an address uses all its cores.
        executor: "processes", "threads" (for functions that release Python's global lock most of the time) or "ray".
        ray_address: of a running cluster; None starts Ray on this machine, unless the caller did.
        weight: bytes that a job works on, by which the bar advances; by jobs for None.

    Raises:
        InputError: a worker was killed (with Ray: several times for one job); Ray is not installed or not at the address.

    An exception of a job is raised here, once the jobs in progress are done or, for threads and Ray, have been ended. Ctrl-C,
    and closing the generator, end them at once; threads where they call `end_if_asked`.
    """
    if not jobs:
        return
    workers = min(n_processes, len(jobs), os.cpu_count() or 1)
    if executor == "ray":
        results = _on_ray(function, jobs, workers, what, ray_address)
    elif workers == 1:
        results = ((job, function(job)) for job in jobs)
    else:
        results = {"processes": _on_processes, "threads": _on_threads}[executor](function, jobs, workers, what)
    # Closed by name: a generator that an exception leaves behind would be closed when Python ends, and wait for its workers.
    bar = {"total": len(jobs), "unit": "file"}
    if weight is not None:
        bar = {"total": sum(map(weight, jobs)), "unit": "B", "unit_scale": True}
    with tqdm(desc=what, **bar) as progress, contextlib.closing(results):
        for result in results:
            yield result
            progress.update(1 if weight is None else weight(result[0]))


_thread = threading.local()


def end_if_asked() -> None:
    """To be called now and then by a long job: ends it if `run_jobs` runs it on a thread and nobody waits for it any more."""
    end = getattr(_thread, "end", None)
    if end is not None and end.is_set():
        raise concurrent.futures.CancelledError


def _on_threads(function: Callable, jobs: list, workers: int, what: str) -> Iterator[tuple]:
    end = threading.Event()

    def prepare():
        _thread.end = end

    with concurrent.futures.ThreadPoolExecutor(workers, what, prepare) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            end.set()
            pool.shutdown(wait=False, cancel_futures=True)


# What `function` of `run_jobs` is in a worker process.
_function: Callable


def _prepare_process(pipe, function: Callable) -> None:
    """Keep `function`, and let this process end when the parent closes its end of `pipe` or is killed.

    It must have ended before a rerun writes the same files.
    """

    def watch():
        multiprocessing.connection.wait([pipe])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    global _function
    _function = function


def _call(job):
    return _function(job)


def _on_processes(function: Callable, jobs: list, workers: int, what: str) -> Iterator[tuple]:
    # spawn: a forked child of a process that has threads (numba, BLAS) may deadlock.
    context = multiprocessing.get_context("spawn")
    for_workers, ours = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_prepare_process, initargs=(for_workers, function)
    )
    with for_workers, ours, pool:
        futures = {pool.submit(_call, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                f"{what}: a worker process was killed, for want of memory maybe; run the same command again, "
                "with fewer --n_processes"
            ) from None
        except (KeyboardInterrupt, GeneratorExit):
            ours.close()
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _import_ray(address: str | None) -> types.ModuleType:
    """Ray, told before its import to report nothing to anybody and, without an address, to listen to this machine alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system, clusters off: the loopback interface is used
    try:
        import ray
    except ImportError:
        raise InputError(
            "--executor ray: Ray is not installed; `pip install ray` (tests/requirements.txt has the version that was tested), "
            "or leave --executor out"
        ) from None
    return ray


def _start_ray(ray: types.ModuleType, workers: int, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
        return
    try:
        if address != "auto":
            # Ray would try for minutes to reach what is not there.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--ray-address {address}: no Ray cluster answers there ({reason}); give HOST:PORT of its head or auto, "
            "or leave it out to start Ray on this machine"
        ) from None


def _on_ray(function: Callable, jobs: list, workers: int, what: str, address: str | None) -> Iterator[tuple]:
    ray = _import_ray(address)
    ours = not ray.is_initialized()
    if ours:
        _start_ray(ray, workers, address)
    waiting = []
    try:
        shared = ray.put(function)
        call = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(lambda function, job: function(job))
        tasks = {call.remote(shared, job): job for job in jobs}
        waiting = list(tasks)
        while waiting:
            done, waiting = ray.wait(waiting)
            yield tasks[done[0]], ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        # The job's own exception, which Ray's wraps in the worker's traceback.
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        raise InputError(
            f"{what}: the worker of a Ray task was killed {RAY_RETRIES + 1} times, for want of memory maybe; run the same "
            "command again, with fewer --n_processes or on larger machines"
        ) from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)
        if ours:
            ray.shutdown()
