"""The CPU backend: answers for the names of torch that Megatron asks of a CUDA device.

Megatron's loop needs no GPU, it only addresses one. Every replaced name stands in `TORCH_CUDA`, `FACTORIES`
or `install`; each costs one Python call where Megatron calls it and nothing for any other operation (there is
no function mode). The names of *Megatron* that the CPU needs replaced stand in `training/seams.py`.
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
    """For calls that have no meaning on the CPU: nothing is ever pending, all work is done already."""


class CpuStream:
    """A stream with nothing to wait for: the CPU executes in order.

    A class and no function: annotations say `torch.cuda.Stream | None`.
    """

    __init__ = wait_stream = wait_event = synchronize = nothing

    def record_event(self, event: Any = None) -> CpuEvent:
        """The moment of this call."""
        recorded = event or CpuEvent()
        recorded.record()
        return recorded


class CpuEvent:
    """The time at which it was recorded."""

    wait = synchronize = nothing

    def __init__(self, *_: Any, **__: Any) -> None:
        self.moment = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the moment."""
        self.moment = time.perf_counter()

    def query(self) -> bool:
        """Always complete."""
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this moment to `end`."""
        return (end.moment - self.moment) * 1e3


STREAM = CpuStream()


@contextlib.contextmanager
def stream_context(stream: Any) -> Iterator[None]:
    """`with torch.cuda.stream(...)`: there is one order of execution, so nothing to switch."""
    yield


def resident_bytes(device: Any = None) -> int:
    """The process's resident memory in bytes."""
    return psutil.Process().memory_info().rss


def memory_stats(device: Any = None) -> dict[str, int]:
    """The process's resident memory (bytes) under the keys of torch.cuda.memory_stats that Megatron reads."""
    keys = ("reserved_bytes.all.current", "allocated_bytes.all.current", "allocated_bytes.all.peak")
    return defaultdict(int, dict.fromkeys(keys, resident_bytes()))


def device_properties(device: Any = None) -> types.SimpleNamespace:
    """What Megatron asks of a device's properties; compute capability 0.0 turns GPU-only choices off."""
    return types.SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
    )


def get_rng_state(device: Any = None) -> torch.Tensor:
    """The CPU generator's state: on this backend it is the device's generator."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    """Set the CPU generator's state."""
    torch.set_rng_state(state.cpu())


# torch.cuda.NAME -> what stands there on the CPU.
TORCH_CUDA: dict[str, Any] = {
    # Megatron skips the creation of the model-parallel groups where it counts no device.
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
    "_lazy_call": lambda call, **_: call(),  # what waits for CUDA's initialization elsewhere
}

# torch.NAME(..., device="cuda") makes a CPU tensor.
FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "linspace", "eye",
    "zeros_like", "ones_like", "empty_like", "full_like", "empty_strided", "as_tensor", "Generator",
)  # fmt: skip


def is_cuda(device: Any) -> bool:
    """Whether `device` (a string, a torch.device or None) names a CUDA device."""
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A factory, or `Tensor.to`, with a CUDA device among its arguments turned into the CPU."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(*(CPU if is_cuda(value) else value for value in args), **kwargs)

    return call


def stay(self: Any, *_: Any, **__: Any) -> Any:
    """`tensor.cuda()` and `module.cuda()`: already where it should be."""
    return self


def with_cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` saying 'torch.cuda.FloatTensor' for a CPU tensor.

    Megatron's optimizers and its gradient clipper sort parameters by this string.
    """

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def distinct(answer: Any, name: str) -> Any:
    """A function object of its own for each name: torch's tracer refuses shared ones."""
    if not isinstance(answer, types.FunctionType):
        return answer
    copy = types.FunctionType(
        answer.__code__, answer.__globals__, name, answer.__defaults__, answer.__closure__
    )
    copy.__kwdefaults__ = answer.__kwdefaults__
    return copy


def uncompiled(model: Any = None, **_: Any) -> Any:
    """`torch.compile` as the identity: Megatron decorates its fusions with it, whose compilation takes longer
    than it saves here (importing the compiler alone takes seconds)."""
    return (lambda function: function) if model is None else model


def fused(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adam's and AdamW's updates in torch's one kernel, four times as fast; Megatron does not ask for it."""

    @functools.wraps(original)
    def init_group(self: Any, group: dict[str, Any], *lists: Any) -> Any:
        group["fused"] = True  # at each step: loading a checkpoint brings the stored groups
        return original(self, group, *lists)

    return init_group


@functools.cache
def install() -> None:
    """Put the answers in place, once for the process. Call before Megatron is imported."""
    torch.compile = uncompiled  # type: ignore[assignment]
    for name, answer in TORCH_CUDA.items():
        setattr(torch.cuda, name, distinct(answer, name))
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)) if name != "Generator" else _CpuGenerator)
    for state in (get_rng_state, set_rng_state):
        setattr(torch.cuda.random, state.__name__, state)
    # The CPU's generator for every device.
    torch.cuda.default_generators = defaultdict(lambda: torch.default_generator)  # type: ignore[assignment]
    torch.Tensor.cuda = stay  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign,assignment]
    torch.Tensor.type = with_cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]
    torch.optim.Adam._init_group = fused(torch.optim.Adam._init_group)  # type: ignore[method-assign]
    torch.Tensor.to = on_cpu(torch.Tensor.to)  # type: ignore[method-assign]


class _CpuGenerator(torch.Generator):
    """`torch.Generator(device="cuda")` is the CPU's."""

    def __new__(cls, device: Any = CPU) -> Any:
        return super().__new__(cls, device=CPU if is_cuda(device) else device)  # type: ignore[call-arg]
