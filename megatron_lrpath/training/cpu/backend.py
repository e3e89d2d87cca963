"""The CPU backend: replacements for the names of torch that Megatron calls for a CUDA device.

Megatron's training loop needs no GPU; it only addresses one. The replaced names are in `TORCH_CUDA`,
`FACTORIES` and `install`. Each costs one Python call where Megatron calls it and nothing for other
operations (there is no function mode). The names of *Megatron* that are replaced on the CPU are in
`training/seams.py`.
"""

from __future__ import annotations

import contextlib
import functools
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

CPU = torch.device("cpu")


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing: the call has no effect on the CPU, because all work is already done."""


class CpuStream:
    """A stream without pending work: the CPU executes in order.

    It is a class, because annotations use `torch.cuda.Stream | None`.
    """

    __init__ = wait_stream = wait_event = synchronize = nothing

    def record_event(self, event: Any = None) -> CpuEvent:
        """Return an event of this moment."""
        recorded = event or CpuEvent()
        recorded.record()
        return recorded


class CpuEvent:
    """The time at which the event was recorded."""

    wait = synchronize = nothing

    def __init__(self, *_: Any, **__: Any) -> None:
        self.moment = 0.0

    def record(self, stream: Any = None) -> None:
        """Record the time."""
        self.moment = time.perf_counter()

    def query(self) -> bool:
        """Return True: the CPU's work is always complete."""
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Return the milliseconds from this event to `end`."""
        return (end.moment - self.moment) * 1e3


STREAM = CpuStream()


@contextlib.contextmanager
def stream_context(stream: Any) -> Iterator[None]:
    """Provide a context for `with torch.cuda.stream(...)`, which does nothing: there is one order of
    execution.
    """
    yield


def resident_bytes(device: Any = None) -> int:
    """Return the process's resident memory in bytes."""
    return psutil.Process().memory_info().rss


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return the process's resident memory (bytes) under the keys of torch.cuda.memory_stats that Megatron
    reads.
    """
    keys = ("reserved_bytes.all.current", "allocated_bytes.all.current", "allocated_bytes.all.peak")
    return defaultdict(int, dict.fromkeys(keys, resident_bytes()))


def device_properties(device: Any = None) -> types.SimpleNamespace:
    """Return the device properties that Megatron reads; compute capability 0.0 disables GPU-only choices."""
    return types.SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
    )


def get_rng_state(device: Any = None) -> torch.Tensor:
    """Return the CPU generator's state: on this backend it is the device's generator."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    """Set the CPU generator's state."""
    torch.set_rng_state(state.cpu())


# torch.cuda.NAME -> its replacement on the CPU.
TORCH_CUDA: dict[str, Any] = {
    # Megatron skips the creation of the model-parallel groups if it counts no device.
    "device_count": lambda: 1,
    "current_device": lambda: CPU,
    "set_device": nothing,
    "synchronize": nothing,
    "empty_cache": nothing,
    "Stream": CpuStream,
    "Event": CpuEvent,
    "current_stream": lambda *_, **__: STREAM,
    "default_stream": lambda *_, **__: STREAM,
    "set_stream": nothing,
    "stream": stream_context,
    "memory_stats": memory_stats,
    "memory_allocated": resident_bytes,
    "max_memory_allocated": resident_bytes,
    "memory_reserved": resident_bytes,
    "max_memory_reserved": resident_bytes,
    "device_memory_used": resident_bytes,
    "reset_peak_memory_stats": nothing,
    "get_rng_state": get_rng_state,
    "set_rng_state": set_rng_state,
    "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
    "manual_seed_all": nothing,  # torch.manual_seed calls it after the CPU's generator
    "get_device_properties": device_properties,
    "get_device_capability": lambda device=None: (0, 0),
    "get_device_name": lambda device=None: "CPU",
    "_lazy_call": lambda call, **_: call(),  # with CUDA the call may wait for the initialization
}

# torch.NAME(..., device="cuda") makes a CPU tensor.
FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "linspace", "eye",
    "zeros_like", "ones_like", "empty_like", "full_like", "empty_strided", "as_tensor", "Generator",
)  # fmt: skip


def is_cuda(device: Any) -> bool:
    """Return whether `device` (a string, a torch.device or None) is a CUDA device."""
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory, or `Tensor.to`, so that a CUDA device in its arguments becomes the CPU."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(*(CPU if is_cuda(value) else value for value in args), **kwargs)

    return call


def stay(self: Any, *_: Any, **__: Any) -> Any:
    """Replace `tensor.cuda()` and `module.cuda()`, which have nothing to do."""
    return self


def with_cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `Tensor.type()`: return 'torch.cuda.FloatTensor' for a CPU tensor.

    Megatron's optimizers and gradient clipping group parameters by this string.
    """

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def distinct(answer: Any, name: str) -> Any:
    """Return a separate function object for each name: torch's tracer refuses shared ones."""
    if not isinstance(answer, types.FunctionType):
        return answer
    copy = types.FunctionType(
        answer.__code__, answer.__globals__, name, answer.__defaults__, answer.__closure__
    )
    copy.__kwdefaults__ = answer.__kwdefaults__
    return copy


def uncompiled(model: Any = None, **_: Any) -> Any:
    """Replace `torch.compile` with the identity: compiling Megatron's fusions takes longer than it saves here
    (importing the compiler alone takes seconds).
    """
    return (lambda function: function) if model is None else model


def fused(original: Callable[..., Any]) -> Callable[..., Any]:
    """Select the fused kernel of Adam and AdamW, which is four times as fast; Megatron does not select it."""

    @functools.wraps(original)
    def init_group(self: Any, group: dict[str, Any], *lists: Any) -> Any:
        group["fused"] = True  # at each step: a loaded checkpoint has the stored groups
        return original(self, group, *lists)

    return init_group


@functools.cache
def install() -> None:
    """Install the replacements, once for each process. Call it before Megatron is imported."""
    torch.compile = uncompiled  # type: ignore[assignment]
    for name, answer in TORCH_CUDA.items():
        setattr(torch.cuda, name, distinct(answer, name))
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)) if name != "Generator" else _CpuGenerator)
    for state in (get_rng_state, set_rng_state):
        setattr(torch.cuda.random, state.__name__, state)
    # Use the CPU's generator for every device.
    torch.cuda.default_generators = defaultdict(lambda: torch.default_generator)  # type: ignore[assignment]
    torch.Tensor.cuda = stay  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign,assignment]
    torch.Tensor.type = with_cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]
    torch.optim.Adam._init_group = fused(torch.optim.Adam._init_group)  # type: ignore[method-assign]
    torch.Tensor.to = on_cpu(torch.Tensor.to)  # type: ignore[method-assign]


class _CpuGenerator(torch.Generator):
    """The CPU's generator for `torch.Generator(device="cuda")`."""

    def __new__(cls, device: Any = CPU) -> Any:
        return super().__new__(cls, device=CPU if is_cuda(device) else device)  # type: ignore[call-arg]
