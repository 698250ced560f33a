"""Ranks: starting them, and the few words they exchange beside gradients."""

import argparse
import os

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder


class Ranks:
    """The processes of a run.

    Started by the `deepspeed` launcher or torchrun, the environment says which rank this is; started by plain `python` it is
    the only one, and no port is opened.

    Attributes:
        rank, world_size: of this process, of all.
        device: where this rank computes.
        is_main: whether this rank writes.
    """

    def __init__(self, options: argparse.Namespace):
        local_rank = max(0, int(os.environ.get("LOCAL_RANK", options.local_rank)))
        accelerator = get_accelerator()
        if accelerator.device_name() == "cpu":
            self.device = torch.device("cpu")
            # DeepSpeed's shared-memory reduction would be compiled at the first start, for 40 s.
            deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
            self._share_cores()
        else:
            accelerator.set_device(local_rank)
            self.device = torch.device(accelerator.device_name(local_rank))
        if not torch.distributed.is_initialized():
            alone = {} if "RANK" in os.environ else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
            torch.distributed.init_process_group(accelerator.communication_backend_name(), **alone)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.is_main = self.rank == 0
        # Words between hosts go over CPU tensors: on a GPU they would make the host wait for the device.
        self._group = torch.distributed.new_group(backend="gloo") if self.world_size > 1 else None

    @staticmethod
    def _share_cores() -> None:
        """Ranks on one machine share its cores, unless the user decided otherwise."""
        local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if "OMP_NUM_THREADS" not in os.environ and local_ranks > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))

    def agree(self, value: float, flag: bool) -> tuple[float, bool]:
        """Rank 0's value, and whether the flag is up on any rank; the same on all ranks.

        Ranks that read their own clocks, or saw a signal at another step, would part ways.
        """
        if self._group is None:
            return value, flag
        shared = torch.tensor([value if self.is_main else 0.0, float(flag)], dtype=torch.float64)
        torch.distributed.all_reduce(shared, group=self._group)
        return shared[0].item(), shared[1].item() > 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a tensor, in place; on a GPU the host doesn't wait for it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    def agree_on_name(self, name: str) -> str:
        """Rank 0's text, on all ranks."""
        shared = [name]
        if self._group is not None:
            torch.distributed.broadcast_object_list(shared, 0, group=self._group)
        return shared[0]

    def add_up(self, *values: torch.Tensor) -> list[float]:
        """Sums over all ranks of one-element tensors, in float64. The host waits for the device here."""
        sums = torch.stack([value.detach().double().reshape(()) for value in values]).cpu()
        if self._group is not None:
            torch.distributed.all_reduce(sums, group=self._group)
        return sums.tolist()

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
