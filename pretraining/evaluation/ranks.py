"""The processes that share a measurement: started by the `deepspeed` launcher or torchrun, or one alone."""

import os

import numpy as np
import torch
import torch.distributed


class Ranks:
    """Which process this is, of how many; sums over all of them go through gloo, in float64.

    Unlike `pretraining.training.distributed.Ranks` it needs no DeepSpeed, whose import takes longer than a small measurement.

    Attributes:
        rank, size: of this process, of all.
        local: the rank among those of this machine, which picks the GPU.
        is_main: whether this process writes and prints.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0
        if self.size > 1:
            torch.distributed.init_process_group("gloo")
            local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))

    def device(self, name: str) -> str:
        """This rank's device, where the user says "cpu" or "cuda"."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def own(self, numbers) -> np.ndarray:
        """Those of the numbers (int64) that are dealt to this rank."""
        numbers = np.asarray(numbers)
        return numbers[numbers % self.size == self.rank]

    def add_up(self, array: np.ndarray) -> np.ndarray:
        """The sum over all ranks of a float64 array; in place, and the same on all ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(torch.from_numpy(array))
        return array

    def close(self) -> None:
        """Leave the others, all at once: one that went ahead would close connections that another still reads from."""
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
