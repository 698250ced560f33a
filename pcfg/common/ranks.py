"""The processes of one command, what they exchange apart from gradients, and threads on the cores of a machine.

Needs torch, which nothing else in `pcfg` does. DeepSpeed is not imported here: that takes longer than a small measurement.
"""

import contextlib
import datetime
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pcfg.common.files import InputError, available_cores

MEETING = 180.0  # seconds for all ranks to come together
EXCHANGE = datetime.timedelta(minutes=30)  # for all ranks to take part in an exchange, as rank 0 may have work of its own
WIDE = 64  # from this width of a model on, torch uses several threads


class Ranks:
    """The processes that share a run or a measurement.

    Under the `deepspeed` launcher, torchrun or srun, the environment says which rank this is. Under plain `python` there is no
    other rank, and no port is opened. Ranks that do not meet within `MEETING` are an `InputError`.

    Args:
        device: of the computation: "cpu", "cuda" (with several ranks: the GPU of this rank on its machine), "cuda:1".
        backend: torch's for gradients, started even for a single rank. None for measurements: they exchange host arrays only.
    """

    def __init__(self, device: str | torch.device = "cpu", backend: str | None = None):
        self.rank = int(os.environ.get("RANK", 0))  # index of this process
        self.size = int(os.environ.get("WORLD_SIZE", 1))  # number of processes
        self.is_main = self.rank == 0  # whether this rank writes and prints
        local = int(os.environ.get("LOCAL_RANK", 0))  # index of this process on its machine
        self.device = torch.device(f"cuda:{local}" if str(device) == "cuda" and self.size > 1 else device)
        if self.size > 1 or backend is not None:
            if not dist.is_initialized() and self.size > 1:
                store = _meet(self.rank, self.size)
                dist.init_process_group(backend or "gloo", store=store, rank=self.rank, world_size=self.size, timeout=EXCHANGE)
            elif not dist.is_initialized():
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Host arrays go over CPU tensors: on a GPU they would make the host wait for the device.
        self._group = dist.new_group(backend="gloo") if self.size > 1 else None

    def own(self, numbers: npt.ArrayLike) -> np.ndarray:
        """The share of this rank in some numbers: int64, those that equal its index modulo the number of ranks."""
        numbers = np.asarray(numbers)
        return numbers[numbers % self.size == self.rank]

    def sum_on_host(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks of a float64 array; in place, and the same on all ranks."""
        if self._group is not None:
            dist.all_reduce(torch.from_numpy(array), group=self._group)
        return array

    def sum_on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a tensor, in place; needs the gradients' backend. The host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: float, flag: bool) -> tuple[float, bool]:
        """Rank 0's value, and whether the flag is set on any rank; the same on all ranks, which would diverge otherwise."""
        value, flags = self.sum_on_host(np.array([value if self.is_main else 0.0, float(flag)])).tolist()
        return value, flags > 0

    def of_main(self, value: Any) -> Any:
        """Rank 0's value, an object that can be pickled, on all ranks."""
        shared = [value]
        if self._group is not None:
            dist.broadcast_object_list(shared, 0, group=self._group)
        return shared[0]

    def wait(self) -> None:
        """Return when all ranks have called this."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Leave the others, all at once: a rank that left first would close connections that another still reads from."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()


def _meet(rank: int, size: int) -> dist.Store:
    """The store of MASTER_ADDR and MASTER_PORT, once all ranks have come there."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", 29500))
    keys = [f"rank{other}" for other in range(size)]
    missing = keys[:1]
    limit = datetime.timedelta(seconds=MEETING)
    deadline = time.monotonic() + MEETING
    # torchrun has a server of its own, and may start all ranks again.
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store: dist.Store | None = None
    try:
        while missing:
            with contextlib.suppress(OSError):
                if store is None and not is_server:  # torch's own tries are pages of output
                    socket.create_connection((host, port), timeout=1).close()
                store = store or dist.PrefixStore(attempt, dist.TCPStore(host, port, size, is_server, limit, False, True))
                store.set(keys[rank], "")
                missing = [key for key in keys if not store.check([key])]
            if missing and time.monotonic() > deadline:
                raise InputError(
                    f"MASTER_ADDR {host}, MASTER_PORT {port}: of {size} ranks, {', '.join(missing)} did not come within "
                    f"{MEETING / 60:g} minutes; see what they print, and whether their machines reach this address"
                )
            time.sleep(0.1 if missing else 0.0)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"MASTER_ADDR {host}, MASTER_PORT {port}: {reason}; is the port in use, or has rank 0 ended?"
        ) from None
    assert store is not None
    store.set_timeout(EXCHANGE)
    return store


def cores_of_rank() -> int:
    """The cores for this process: OMP_NUM_THREADS, else its share of the machine's (or SLURM job's) among the ranks there.

    srun may have bound the process to its share already.
    """
    ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", available_cores()))
    return _threads_of_user() or max(1, min(available_cores(), cores // ranks))


def _threads_of_user() -> int:
    """OMP_NUM_THREADS; 0 if it is not given, or no number that libgomp would take."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def use_threads(width: int) -> int:
    """Set the number of torch's threads for work on a model of some width, and return it.

    Small models have one thread: a second one gains little, and next to a busy process the two wait for each other. The number
    depends on command and machine alone, not on what else runs: rounding depends on it. OMP_NUM_THREADS wins.
    """
    threads = _threads_of_user() or (cores_of_rank() if width >= WIDE else 1)
    torch.set_num_threads(threads)
    return threads


@contextlib.contextmanager
def map_on_cores(device: torch.device) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A lazy `map` in threads of one core each; the built-in `map` on a GPU or with one core.

    On a CPU, small batches in parallel are faster than each batch on all cores, above all if other programs use the cores too.
    """
    cores = cores_of_rank()
    before = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        yield map
        return

    def run(function: Callable, items: Iterable) -> Iterator:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)  # later threads inherit the last setting
        pool = stack.enter_context(ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield run
