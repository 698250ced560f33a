"""A CUDA device without a GPU: tensors that say cuda:0, obey the rules of devices, and hold their numbers on the CPU.

Within `PretendCuda()`, code that puts models and batches on "cuda" runs on a CPU build of torch. Operations are dispatched as
on a GPU, with CUDA's autocast lists and a device thread of autograd, and computed by the CPU's kernels. Operands on two devices
raise the error of CUDA. Recorded are: each wait of the host for the device, the attention kernel that an H100 would take, the
shapes for which cuDNN would build a plan, and products of 16-bit matrices whose rows are not aligned.

It knows nothing of memory, time, streams and the limits of kernels. It changes internals of torch for the whole process, before
the first backward pass: `programs_on_cuda.py` runs it in a process of its own.
"""

import collections
import contextlib
import ctypes
import os
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

VERSION = "2.13"  # of torch, whose internals these are
ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
# Operations for which the host waits until all that was queued before has run, in ATen's CUDA kernels.
WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.unique_dim.default: "unique_dim",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.linalg_cholesky.default: "cholesky",
}
COPYING = {aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor}  # may have operands on two devices
INDEXING = {
    *(aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default),
    *(aten._unsafe_index.Tensor, aten._unsafe_index_put.default),
}
LOAD_STATE_DICT = torch.nn.Module.load_state_dict
PRODUCTS = {aten.mm.default, aten.addmm.default}  # but for those of attention, which has a kernel
_referenced_by_torch: list[object] = []  # what C++ has pointers to


def install() -> None:
    """Let a CPU build of torch take CUDA for built in, with a device guard that does nothing.

    torch has this guard, for CUDA builds on machines without a GPU: `ensureCUDADeviceGuardSet` puts it in the place of one that
    counts 0 devices. Autograd asks CUDA's hooks whether CUDA is built: their virtual functions 2 and 4.
    """
    libraries = os.path.join(os.path.dirname(torch.__file__), "lib")
    c10 = ctypes.CDLL(os.path.join(libraries, "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    zero = ctypes.CFUNCTYPE(ctypes.c_long)(lambda: 0)
    table = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(table))
    guards[1] = ctypes.addressof(guard)
    c10._ZN3c104impl24ensureCUDADeviceGuardSetEv()
    assert guards[1] != ctypes.addressof(guard)

    find = ctypes.CDLL(os.path.join(libraries, "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    find.restype = ctypes.c_void_p
    hooks = (ctypes.c_void_p * 1).from_address(find())
    functions = (ctypes.c_void_p * 130)(*(ctypes.c_void_p * 130).from_address(hooks[0] - 16))  # after two words of the class
    yes = ctypes.CFUNCTYPE(ctypes.c_long)(lambda: 1)
    for number in (2, 4):
        functions[2 + number] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(functions) + 16
    _referenced_by_torch.extend([yes, functions])


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0; its numbers are in `held`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), device="cuda:0", **layout)
        tensor.held = held
        return tensor

    def __repr__(self):
        return f"CudaTensor({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if PretendCuda.current is None:
            raise RuntimeError(f"{func}: on a tensor of PretendCuda, outside of it")
        return PretendCuda.current.run(func, args, kwargs or {})


def held(value):
    """The numbers of a tensor on the device; any other value as it is."""
    return value.held if isinstance(value, CudaTensor) else value


class Event:
    """A CUDA event, which knows how many operations were queued before it."""

    def __init__(self, *_, **__): ...

    def record(self, *_):
        self._operations = PretendCuda.current.operations

    def query(self):
        return True

    def synchronize(self):
        PretendCuda.current.wait("event", PretendCuda.current.operations - self._operations)

    def elapsed_time(self, *_):
        return 0.0


class _Functions(TorchFunctionMode):
    """Calls from Python that a CPU build refuses, or that do not reach the dispatcher as one operation."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self.owner.pinned[pinned.untyped_storage().data_ptr()] = pinned
            return pinned
        if func is torch.Tensor.tolist and isinstance(args[0], CudaTensor):
            self.owner.wait("tolist")
            return args[0].held.tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], CudaTensor):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first"
            )
        if getattr(func, "__module__", "") == "torch.distributed.distributed_c10d":
            args, kwargs = tree_map(held, (args, kwargs))
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], CudaTensor):
            self.owner.note_attention(*args, **kwargs)
        return func(*args, **kwargs)


class PretendCuda(TorchDispatchMode):
    """The device, within its block.

    Attributes:
        operations: number of those queued so far.
        waits: (reason, the project's line, operations queued since the point that the host waits for) of each wait of the host.
        attention: how often each kernel would be taken.
        plans: the shapes for which cuDNN would build a plan.
        unaligned: lines of 16-bit products of matrices with rows of no multiple of 16 bytes.
    """

    current = None

    def __init__(self):
        super().__init__()
        self.pinned = {}
        self.clear()

    def clear(self):
        self.operations = 0
        self.waits, self.attention, self.plans, self.unaligned = [], collections.Counter(), set(), set()

    def __enter__(self):
        PretendCuda.current = self
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(patched_torch())
        self._stack.enter_context(_Functions(self))
        return super().__enter__()

    def __exit__(self, *exception):
        result = super().__exit__(*exception)
        self._stack.close()
        PretendCuda.current = None
        return result

    def wait(self, reason, queued_since=0):
        self.waits.append((reason, self.line(), queued_since))

    def line(self):
        """The innermost line of the project on the stack, as file:line."""
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        frames = [frame for frame in frames if "site-packages" not in frame.filename and "/tests/" not in frame.filename]
        return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "tests"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        host = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == "cuda"
        if not own and not to_device:
            return func(*args, **kwargs)
        if own and host:
            check_devices(func, args, host)
        self._note(func, args, kwargs, own, host, to_device)
        if wanted is not None:
            kwargs = {**kwargs, "device": "cpu"}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        with torch._C._DisableTorchDispatch():
            result = func(*tree_map(held, args), **tree_map(held, kwargs))
        if not to_device and wanted is not None:
            return result
        in_place = {id(tensor.held): tensor for tensor in own}
        is_new = lambda value: isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor)  # noqa: E731
        wrapped = lambda value: in_place.get(id(value)) or CudaTensor(value) if is_new(value) else value  # noqa: E731
        with torch._C._DisableTorchDispatch():
            return tree_map(lambda value: in_place[id(value)] if id(value) in in_place else wrapped(value), result)

    def _note(self, func, args, kwargs, own, host, to_device):
        self.operations += bool(own) and func.namespace != "prim"
        if func in WAITING and own:
            self.wait(WAITING[func])
        elif func in INDEXING and own:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("index by a mask")
            if any(not isinstance(index, CudaTensor) and index.dim() for index in indices):
                self.wait("index on the host")
        elif func is aten._to_copy.default:
            if not own:
                self._note_upload(args[0], kwargs.get("non_blocking", False))
            elif not to_device and kwargs.get("device") is not None and not kwargs.get("non_blocking", False):
                self.wait("copy to the host")
        elif func is aten.copy_.default and host:
            is_free = len(args) > 2 and args[2]
            if not isinstance(args[0], CudaTensor):
                if not is_free:
                    self.wait("copy to the host")
            elif args[1].dim():
                self._note_upload(args[1], is_free)
        elif func in PRODUCTS and own[0].dtype in (torch.float16, torch.bfloat16):
            rows = [max(stride for stride in matrix.stride()[-2:]) for matrix in own if matrix.dim() >= 2]
            if any(row % 8 for row in rows):
                self.unaligned.add(self.line())

    def _note_upload(self, source, is_free):
        if source.untyped_storage().data_ptr() not in self.pinned:
            self.wait("copy from memory that is not pinned")
        elif not is_free:
            self.wait("copy to the device")

    def note_attention(self, query, key, _, attn_mask=None, dropout_p=0.0, **__):
        """The first kernel that fits, as `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` orders them for an H100."""
        is_autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_autocast else query.dtype
        is_half = dtype in (torch.float16, torch.bfloat16)
        width = query.shape[-1]
        fits_cudnn = is_half and width % 8 == 0 and width <= 128 and key.shape[2] > 1 and dropout_p * 16 % 1 == 0
        fits_cudnn &= (not dropout_p or query.shape[2] > 1) and torch.backends.cuda.cudnn_sdp_enabled()
        if fits_cudnn:
            self.plans.add((tuple(query.shape), query.stride(), tuple(key.shape), attn_mask is None, dropout_p))
        fits = {"cudnn": fits_cudnn, "flash": is_half and attn_mask is None and width <= 256}
        fits |= {"efficient": width % (8 if is_half else 4) == 0, "math": True}
        self.attention[next(name for name in fits if fits[name])] += 1


def check_devices(func, args, host):
    """Raise CUDA's error for operands on the host, which may only be numbers, copies or indices."""
    if func in COPYING:
        return
    if func in INDEXING:
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError(f"{func}: indices should be on the CPU, as the indexed tensor is")
        host = [value for value in args[2:3] if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor)]
    shapes = [tuple(tensor.shape) for tensor in host if tensor.dim()]
    if shapes:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but {shapes} are on the CPU")


def _enter_inference(self):
    """Inference mode as no_grad: its tensors have no versions, which a tensor around another one needs."""
    self._before = torch.is_grad_enabled()
    torch.set_grad_enabled(not self.mode)


def _exit_inference(self, *_):
    torch.set_grad_enabled(self._before)


def _load_state_dict(module, *args, **kwargs):
    """Module.load_state_dict that copies, as on other devices: a tensor that is swapped loses its hooks."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        return LOAD_STATE_DICT(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def _swap_tensors(first, second):
    """torch.utils.swap_tensors for tensors with weak references, too: DeepSpeed has some."""
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


@contextlib.contextmanager
def patched_torch():
    """What torch says of CUDA to Python; Module.to keeps the parameters, as on a GPU."""
    answers = {
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (torch.cuda, "is_bf16_supported"): lambda *_, **__: True,
        (torch.cuda, "_lazy_init"): lambda: None,
        (torch.cuda, "is_available"): lambda: True,
        (torch.cuda, "get_device_capability"): lambda *_: (9, 0),
        (torch.cuda, "get_device_name"): lambda *_: "Pretended",
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "device_count"): lambda: 1,
        (torch.cuda, "mem_get_info"): lambda *_: (1 << 40, 1 << 40),
        (torch.cuda, "empty_cache"): lambda: None,
        (torch.cuda, "manual_seed_all"): lambda *_: None,
        (torch.cuda, "get_rng_state"): lambda *_: torch.get_rng_state(),
        (torch.cuda, "set_rng_state"): lambda *_: None,
        (torch.cuda, "synchronize"): lambda *_: PretendCuda.current.wait("synchronize"),
        (torch.cuda, "Event"): Event,
        (torch.utils, "swap_tensors"): _swap_tensors,
        (torch.nn.Module, "load_state_dict"): _load_state_dict,
        (torch.inference_mode, "__enter__"): _enter_inference,
        (torch.inference_mode, "__exit__"): _exit_inference,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU, and copied
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        for (owner, name), answer in answers.items():
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield
