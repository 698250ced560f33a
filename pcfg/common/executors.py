"""Jobs in parallel: in processes or threads of this machine, or as Ray Core tasks, with the same results.

The result of a job is a function of the job alone, so the executor and the number of workers change only the time.
"""

import argparse
import concurrent.futures.process
import contextlib
import multiprocessing.connection
import os
import socket
import threading
import types
from collections.abc import Callable, Generator
from typing import Any

from tqdm import tqdm

from pcfg.common.cli import positive_int
from pcfg.common.files import InputError

RAY_RETRIES = 3  # of a task whose worker died
CONNECT_SECONDS = 10
# The beginning of a connection by HTTP/2, which Ray speaks: preface and empty frame of settings. A server answers by type 4.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def add_processes_argument(parser: argparse._ActionsContainer) -> None:
    """Add --n_processes."""
    cores = os.cpu_count() or 1
    text = "files processed in parallel on this machine, at most one per core; changes only the time; default: all cores"
    parser.add_argument("--n_processes", type=positive_int, default=cores, help=text)


def add_executor_arguments(parser: argparse._ActionsContainer) -> None:
    """Add --n_processes, --executor and --ray-address to a parser or a group of it; `executor_options` reads them."""
    add_processes_argument(parser)
    text = "process files on this machine, or as Ray Core tasks of one core each (`pip install ray`); default local"
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help=text)
    text = (
        "HOST:PORT of a Ray cluster, or auto; its machines must see the same folders, and each of its cores processes one "
        "file; default: Ray is started on this machine, with --n_processes"
    )
    parser.add_argument("--ray-address", help=text)


def executor_options(options: argparse.Namespace, local: str) -> dict:
    """The arguments of `run_jobs` for the flags of `add_executor_arguments`; `local` is "processes" or "threads"."""
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

    An exception of a job is raised here, after the jobs in progress have finished or, for threads and Ray, have been stopped.
    Ctrl-C, and closing the generator, stop them at once; threads stop where they call `end_if_asked`. A killed worker (with
    Ray: killed several times for one job) is an `InputError`.

    Args:
        function: a pure function of its job; except for threads, importable or a `functools.partial` of an importable
            function. It is sent to each worker once, so large data that all jobs share belong into the partial.
        n_processes: maximum number of parallel jobs, also limited by the cores. A Ray cluster uses all its cores.
        executor: "processes", "threads" (for functions that release Python's global lock most of the time) or "ray".
        ray_address: of a running cluster; None starts Ray on this machine, unless the caller did.
        weight: bytes that a job processes, by which the bar advances; None for the number of jobs.
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
    # Closed explicitly: a generator left behind by an exception is closed when Python ends, and then waits for its workers.
    bar: dict[str, Any] = {"total": len(jobs), "unit": "file"}
    if weight is not None:
        bar = {"total": sum(map(weight, jobs)), "unit": "B", "unit_scale": True}
    with tqdm(desc=what, **bar) as progress, contextlib.closing(results):
        for result in results:
            yield result
            progress.update(1 if weight is None else weight(result[0]))


_thread = threading.local()


def end_if_asked() -> None:
    """Stop the calling job if `run_jobs` runs it in a thread and its result is no longer needed; long jobs call this often."""
    end = getattr(_thread, "end", None)
    if end is not None and end.is_set():
        raise concurrent.futures.CancelledError


def _on_threads(function: Callable, jobs: list, workers: int, what: str) -> Generator[tuple, None, None]:
    end = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(workers, what, setattr, (_thread, "end", end)) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            end.set()
            pool.shutdown(wait=False, cancel_futures=True)


# The `function` of `run_jobs`, in a worker process.
_function: Callable


def _prepare_process(pipe: multiprocessing.connection.Connection, function: Callable) -> None:
    """Store `function`, and stop this process when the parent closes its end of `pipe` or is killed.

    Otherwise this process could still write files that a rerun writes.
    """

    def watch() -> None:
        multiprocessing.connection.wait([pipe])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    global _function
    _function = function


def _call(job: Any) -> Any:
    return _function(job)


def _on_processes(function: Callable, jobs: list, workers: int, what: str) -> Generator[tuple, None, None]:
    # spawn: a forked child of a process that has threads (numba, BLAS) may deadlock.
    context = multiprocessing.get_context("spawn")
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_prepare_process, initargs=(worker_end, function)
    )
    with worker_end, parent_end, pool:
        futures = {pool.submit(_call, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                f"{what}: a worker process was killed, possibly because memory ran out; run the same command again, with fewer "
                "--n_processes"
            ) from None
        except (KeyboardInterrupt, GeneratorExit):
            parent_end.close()
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _import_ray(address: str | None) -> types.ModuleType:
    """Ray, configured before its import to report no usage and, without an address, to listen to this machine only."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: use the loopback interface
    else:
        os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", str(2 * CONNECT_SECONDS))  # for Ray on this machine
    try:
        import ray
    except ImportError:
        raise InputError(
            "--executor ray: Ray is not installed; `pip install ray` (tests/requirements.txt has the tested version), or leave "
            "--executor out"
        ) from None
    return ray


def _start_ray(ray: types.ModuleType, workers: int, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
        return
    try:
        if address != "auto":
            # Ray would try for minutes to reach a missing address, or what is not Ray.
            host, _, port = address.rpartition(":")
            if not port.isdecimal() or not host:
                raise ValueError("not HOST:PORT")
            with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as head:
                head.sendall(HTTP2)
                if head.recv(4)[3:] != b"\4" and "RAY_USE_TLS" not in os.environ:
                    raise OSError("something else listens")
        ray.init(address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        # Ray's own has many lines: the versions, or a traceback with an exception of Ray at its end.
        reason = " ".join(str(error.__cause__ or error).rpartition("ray.exceptions.")[2].split())[:400]
        reason = "it answers, but does not run on this machine" if reason.startswith("No node info found") else reason
        raise InputError(
            f"--ray-address {address}: no Ray cluster to join there ({reason}); give HOST:PORT of its head or auto, on a "
            "machine of the cluster (ray start --address HOST:PORT), or leave it out to start Ray on this machine"
        ) from None


def _on_ray(function: Callable, jobs: list, workers: int, what: str, address: str | None) -> Generator[tuple, None, None]:
    ray = _import_ray(address)
    is_ours = not ray.is_initialized()
    if is_ours:
        _start_ray(ray, workers, address)
    waiting: list = []
    try:
        shared = ray.put(function)
        call = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(lambda function, job: function(job))
        tasks = {call.remote(shared, job): job for job in jobs}
        waiting = list(tasks)
        while waiting:
            (finished,), waiting = ray.wait(waiting)
            yield tasks[finished], ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        # Ray's exception wraps the job's own one in the worker's traceback.
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        raise InputError(
            f"{what}: the worker of a Ray task was killed {RAY_RETRIES + 1} times, possibly because memory ran out; run the "
            "same command again, with fewer --n_processes or on larger machines"
        ) from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)
        if is_ours:
            ray.shutdown()
