"""DeepSpeed's accelerator for `pretend_cuda`: it says of itself what CUDA's says, and does what the CPU's does."""

import contextlib

import deepspeed
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from tests.pretend_cuda import Event


class Stream:
    def wait_stream(self, *_): ...

    def wait_event(self, *_): ...

    def synchronize(self): ...

    def record_event(self, *_): ...


class PretendAccelerator(CPU_Accelerator):
    def __init__(self, device):
        super().__init__()
        self._device = device

    def is_synchronized_device(self):
        return False

    def use_host_timers(self):
        return False

    def resolves_data_dependency(self):
        return False

    def handles_memory_backpressure(self):
        return False

    def device_name(self, device_index=None):
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def current_device(self):
        return 0

    def current_device_name(self):
        return "cuda:0"

    def is_fp16_supported(self):
        return True

    def supported_dtypes(self):
        return [torch.float32, torch.float16, torch.bfloat16]

    def synchronize(self, *_):
        self._device.wait("synchronize")

    def stream(self, *_):
        return contextlib.nullcontext()

    def current_stream(self, *_):
        return Stream()

    def default_stream(self, *_):
        return Stream()

    @property
    def Stream(self):
        return lambda *_, **__: Stream()

    @property
    def Event(self):
        return Event

    def on_accelerator(self, tensor):
        return tensor.device.type == "cuda"


@contextlib.contextmanager
def deepspeed_on(device):
    """DeepSpeed takes the pretended device for its own."""
    before = real_accelerator.ds_accelerator
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # the CPU's reduction, which would be compiled
    real_accelerator.set_accelerator(PretendAccelerator(device))
    try:
        yield
    finally:
        real_accelerator.ds_accelerator = before
