"""A CUDA GPU simulated on the CPU: device placement, reads by the host, and captured graphs.

Tensors "on the GPU" wrap tensors of the CPU and have the device `cuda:0`, so Python code takes its branches for CUDA.
Operators compute on the CPU. As on a GPU, an operator does not take tensors of both devices, and while a graph is
captured (`simulated_graphs`) the host may neither read a value nor copy between the devices.

Differences from a GPU:

- Code in C++ takes its branches for the CPU, autocast has the lists of the CPU, and the backward pass runs in the
  thread that called it.
- Streams and events: work is done when it is launched. A missing `wait_stream` is not noticed.
- Of what the host waits for, these are not counted: events, copies in the background from memory that is not pinned,
  allocations, and reads within an operator unless `READS` lists it.
- Any operator takes a number of the host, a tensor without dimensions, except for `cat` and `stack`.
- PyTorch's own kernels take the place of Triton's.
"""

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from diffdiscover3d import losses
from diffdiscover3d.models import triton_norm
from diffdiscover3d.training import brain_scenes, dropout, precision
from tests.helpers.simulated_graphs import Graph, Held, SimulatedGPU, capture, the_gpu

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 16 * 2**30  # bytes, all of them free
COPIES = ("copy_", "_foreach_copy_")
READS = (
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "bincount", "linalg_matrix_exp", "_linalg_check_errors",
)  # fmt: skip
JOINS = ("cat", "stack")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
CACHES = (  # of tensors, by their device
    losses._on_device, losses.interpolation_matrix, dropout._hashed_positions, dropout._salts, brain_scenes._constant,
    precision.measure,
)  # fmt: skip


class GPUTensor(torch.Tensor):
    """A tensor on the GPU.

    Args:
        inner: the tensor of the CPU that has its values.
    """

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **layout, device=inner.device, requires_grad=requires_grad
        )

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False):
        self.held = Held(inner.detach())

    inner = property(lambda self: self.held.inner)
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, *, tensor_contents=None):
        return f"GPUTensor({self.inner})"

    def __tensor_flatten__(self):  # `Module.to` then exchanges what a parameter holds and keeps the parameter
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return GPUTensor(inner["inner"])

    def __deepcopy__(self, memo):
        copied = GPUTensor(self.inner.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat, layout = tree_flatten((args, kwargs))
        name = function._overloadpacket.__name__
        _check_operator(name, args, kwargs, [x for x in flat if isinstance(x, torch.Tensor)])
        if the_gpu.recorder is not None:
            the_gpu.recorder.note_inputs(x.inner for x in flat if isinstance(x, GPUTensor))
        inner_args, inner_kwargs = tree_unflatten([_inner(x) for x in flat], layout)
        found = the_gpu.compute(function, *inner_args, **inner_kwargs)
        wrapped = tree_map(lambda x: GPUTensor(x) if isinstance(x, torch.Tensor) else x, found)
        return return_and_correct_aliasing(function, args, kwargs, wrapped)


def _check_operator(name: str, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> None:
    """What a GPU refuses: tensors of both devices; in a capture also reads by the host and copies between devices."""
    numbers_allowed = name not in COPIES + JOINS
    on_host = [x for x in tensors if not isinstance(x, GPUTensor) and (x.dim() or not numbers_allowed)]
    if name in READS:
        the_gpu.wait(name)
    elif name in INDEXING:
        by_mask = any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        fills = name != "index" and args[2].numel() == 1  # with one value a GPU does not count the mask
        if on_host or (by_mask and not fills):
            the_gpu.wait(f"{name} by {'a tensor of the host' if on_host else 'a mask'}")
    elif on_host and name in COPIES:
        in_background = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        (the_gpu.forbid_in_capture if in_background else the_gpu.wait)("a copy between host and device")
    elif on_host:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def _inner(value):
    if isinstance(value, GPUTensor):
        return value.inner
    if isinstance(value, torch.Tensor) and the_gpu.recorder is not None and not value.dim():
        return value.clone()  # a number of the host is an argument of the kernel, which a replay does not read again
    return CPU if isinstance(value, torch.device) else value


class OnGPU(TorchFunctionMode):
    """Makes tensors on the GPU, and moves tensors between the devices."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, GPUTensor):
            if function == torch.Tensor.data.__set__:
                first.held = Held(args[1].inner)
            elif name in ("data_ptr", "storage", "untyped_storage"):
                return getattr(first.inner, name)()
            elif name == "tolist":
                the_gpu.wait(name)
                return first.inner.tolist()
            elif name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            elif name == "one_hot":  # compares with a tensor that it makes on the CPU
                return GPUTensor(the_gpu.compute(function, first.inner, *args[1:], **kwargs))
        if name in ("to", "cpu", "cuda") or (name == "as_tensor" and isinstance(first, torch.Tensor)):
            return _move(name, *args, **kwargs)
        if name == "_parse_to" or GPU.type not in (_device_type(x) for x in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        if name in ("tensor", "as_tensor"):
            the_gpu.wait("a copy from host to device")
        if function is torch.device:
            return function(*args, **kwargs)
        found = the_gpu.compute(function, *map(_on_cpu, args), **{k: _on_cpu(v) for k, v in kwargs.items()})
        return found if isinstance(found, GPUTensor) else GPUTensor(found, found.requires_grad)


def _move(name: str, x: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    """`Tensor.to`, `cpu` or `cuda`, or `torch.as_tensor` of a tensor."""
    layout, in_background = kwargs.get("memory_format"), kwargs.get("non_blocking", False)
    if name in ("cpu", "cuda"):
        device, dtype = (CPU if name == "cpu" else GPU), None
    elif args and isinstance(args[0], torch.Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, in_background, layout = torch._C._nn._parse_to(*args, **kwargs)
    options = {"dtype": dtype or x.dtype, "copy": copy}
    if layout is not None:
        options["memory_format"] = layout
    on_gpu = isinstance(x, GPUTensor)
    if device is None or (device.type == GPU.type) == on_gpu:
        return torch.Tensor.to(x, **options)
    if in_background:
        the_gpu.forbid_in_capture("a copy between host and device")
    else:
        the_gpu.wait("a copy between host and device")
    if on_gpu:
        return torch.Tensor.to(x.inner.clone(), **options)
    return GPUTensor(torch.Tensor.to(x.detach().clone(), **options), x.requires_grad)


def _device_type(value) -> str | None:
    """The type of a device that an argument names."""
    if isinstance(value, torch.device):
        return value.type
    return value.split(":")[0] if isinstance(value, str) else None


def _on_cpu(value):
    return CPU if _device_type(value) == GPU.type else value


class Stream:
    """Stands in for a stream, to which nothing is still to be done."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other) -> None:
        pass


class Event:
    """Stands in for an event, which happens when it is recorded."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.seconds - self.seconds)


class Generator(torch.Generator):
    """A generator of the CPU that has the device it is made for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, CPU)

    def __init__(self, device="cpu"):
        self._device = torch.device(device)

    device = property(lambda self: self._device)


class Autocast(torch.autocast):
    """Autocast of the GPU, which is that of the CPU."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__(_backend(device_type), *args, **kwargs)


def _backend(device_type: str) -> str:
    return CPU.type if device_type == GPU.type else device_type


def _for_backend(real):
    return lambda device_type: real(_backend(device_type))


def _grouped(tensors: list, with_indices: bool = False, real=torch._C._group_tensors_by_device_and_dtype) -> dict:
    """Groups of tensors by device and type, for optimisers and clipping."""
    on_gpu = any(isinstance(x, GPUTensor) for table in tensors for x in table)
    return {(GPU if on_gpu else place, dtype): found for (place, dtype), found in real(tensors, with_indices).items()}


@contextlib.contextmanager
def simulated_gpu(monkeypatch) -> Iterator[SimulatedGPU]:
    """A GPU within a block."""
    the_gpu.__init__()

    def nothing(*_):
        return contextlib.nullcontext()

    for name, value in {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capture, "device": nothing, "stream": nothing,
        "current_stream": lambda *_: Stream(), "set_stream": nothing, "empty_cache": nothing,
        "synchronize": lambda *_: the_gpu.wait("torch.cuda.synchronize"),
        "is_available": lambda: True, "device_count": lambda: 1, "is_bf16_supported": lambda *_: True,
        "mem_get_info": lambda *_: (MEMORY, MEMORY), "memory_reserved": lambda *_: 0, "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": nothing, "set_sync_debug_mode": nothing,
        "get_device_properties": lambda *_: SimpleNamespace(name="a simulated GPU", total_memory=MEMORY),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", nothing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: x)
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", _for_backend(torch.is_autocast_enabled))
    monkeypatch.setattr(torch, "get_autocast_dtype", _for_backend(torch.get_autocast_dtype))
    monkeypatch.setattr(torch.amp, "is_autocast_available", _for_backend(torch.amp.is_autocast_available))
    monkeypatch.setattr(triton_norm, "_compiles", lambda device: False)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its bfloat16 gradients of tiny grids are wrong
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # or accelerate initialises CUDA
    monkeypatch.setattr(Accelerator, "device", GPU)
    _clear_caches()
    try:
        with OnGPU():
            yield the_gpu
    finally:
        _clear_caches()


def _clear_caches() -> None:
    for cached in CACHES:
        cached.cache_clear()
