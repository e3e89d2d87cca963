"""Probes of a real training, run in its process: record what the optimizer uses and the model reads."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def nothing() -> Iterator[None]:
    """Record nothing."""
    yield None


@contextmanager
def rates() -> Iterator[list[list[float]]]:
    """Record the rate in every parameter group at each update of the inner optimizer, in order."""
    from megatron.training import training
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[list[float]] = []
    training_now = False
    original = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal training_now
        training_now = True
        try:
            return original(*args, **kwargs)
        finally:
            training_now = False

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        if training_now:  # loading also makes a step, whose result is overwritten
            seen.append([float(group["lr"]) for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(note)
    training.train_step = step
    yield seen
    training.train_step = original
    handle.remove()


@contextmanager
def tokens() -> Iterator[list[list[str]]]:
    """Record for every micro-batch that reaches the model on this rank a digest of each of its samples."""
    from megatron_lrpath.training import forward

    seen: list[list[str]] = []
    original = forward.get_batch

    def watching(*args: Any) -> Any:
        batch = original(*args)
        pairs = zip(batch["tokens"].numpy(), batch["labels"].numpy(), strict=True)
        seen.append([hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()[:16] for x, y in pairs])
        return batch

    forward.get_batch = watching
    yield seen
    forward.get_batch = original


@contextmanager
def state_at_start() -> Iterator[dict[str, Any]]:
    """Record weights, optimizer state, RNG and counters right before training begins."""
    from megatron.training import get_args, training

    seen: dict[str, Any] = {}
    original = training.train

    def watching(forward: Any, model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(snapshot(model, optimizer, get_args()))
        return original(forward, model, optimizer, scheduler, *args, **kwargs)

    training.train = watching
    yield seen
    training.train = original


@contextmanager
def state_at_end() -> Iterator[dict[str, Any]]:
    """Record the state after the last step, without the counters, which Megatron's loop does not keep."""
    from megatron.training import get_args, training

    seen: dict[str, Any] = {}
    original = training.train

    def watching(forward: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        ended = original(forward, model, optimizer, *args, **kwargs)
        seen.update(snapshot(model, optimizer, get_args()))
        del seen["iteration"]
        seen["moments"] = [one for one in seen["moments"] if "weight" in one]
        return ended

    training.train = watching
    yield seen
    training.train = original


@contextmanager
def betas() -> Iterator[list[tuple[float, float]]]:
    """Record Adam's betas in every parameter group at each update."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[tuple[float, float]] = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.extend(tuple(group["betas"]) for group in optimizer.param_groups)

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


def snapshot(model: Any, optimizer: Any, args: Any) -> dict[str, Any]:
    """Return all state that determines the rest of a training, as digests of exact bytes."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    weights = {
        name: digest(tensor)
        for chunk in model
        for name, tensor in chunk.state_dict().items()
        if tensor is not None
    }
    moments: list[Any] = []
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                state = inner.optimizer.state[parameter]
                moments.append(
                    {key: digest(state[key]) for key in sorted(state)} | {"weight": digest(parameter)}
                )
            moments.append({"step": group.get("step")})
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "weights": weights,
        "moments": moments,
        "torch_rng": digest(torch.get_rng_state()),
        "numpy_rng": hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),
        "tracker": {name: digest(state) for name, state in tracker.items()},
        "iteration": args.iteration,
        "consumed_train_samples": args.consumed_train_samples,
    }


def digest(value: Any) -> Any:
    """Return a digest of a tensor's bytes and type; return other values unchanged."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    raw = (
        value.detach().contiguous().view(torch.uint8)
        if value.dim()
        else value.detach().reshape(1).view(torch.uint8)
    )
    return f"{value.dtype}:{tuple(value.shape)}:{hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:24]}"


@contextmanager
def save_at_start() -> Iterator[None]:
    """Save a checkpoint of the loaded state and stop, without a training step."""
    from megatron.training import get_args, training

    original = training.train

    def save_and_stop(
        forward: Any, model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        training.save_checkpoint_and_time(get_args().iteration, model, optimizer, scheduler, 0, {})
        raise SystemExit(0)

    training.train = save_and_stop
    yield None
    training.train = original


@contextmanager
def no_random_states() -> Iterator[None]:
    """Remove the random states from the loaded state: Megatron reports that and exits with 0."""
    from megatron.training import checkpointing

    original = checkpointing._load_base_checkpoint

    def without(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        loaded[0].pop("rng_state", None)
        return loaded

    checkpointing._load_base_checkpoint = without
    yield None
    checkpointing._load_base_checkpoint = original


@contextmanager
def unfused_attention() -> Iterator[list[int]]:
    """Train with Megatron's unfused attention instead of ours; record the layers that it computes."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lrpath.training import layers

    seen: list[int] = []

    class Watched(DotProductAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.layer_number)
            return super().forward(*args, **kwargs)

    ours = layers.SDPACoreAttention
    layers.SDPACoreAttention = Watched
    yield seen
    layers.SDPACoreAttention = ours


@contextmanager
def wandb_offline() -> Iterator[None]:
    """Make W&B write to its folder without a connection; record nothing."""
    import os

    os.environ["WANDB_MODE"] = "offline"
    yield None


@contextmanager
def written_for_a_group() -> Iterator[list[str]]:
    """Record the paths that the process writes, makes or renames to, under a umask that excludes others."""
    import os
    import sys

    seen: list[str] = []
    watched = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1}

    def note(event: str, values: tuple[Any, ...]) -> None:
        writes = event == "open" and (values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        path = values[0] if writes else values[watched[event]] if event in watched else None
        if isinstance(path, str | bytes | os.PathLike):
            seen.append(os.path.abspath(os.fsdecode(path)))

    os.umask(0o027)
    sys.addaudithook(note)  # stays until the process ends
    yield seen


@contextmanager
def killed_after_answers() -> Iterator[None]:
    """Kill the process when a model has answered all prompts, before a result is recorded."""
    import os

    from megatron_lrpath.evaluate import downstream_worker

    downstream_worker.add_result = lambda *_: os._exit(9)
    yield None


@contextmanager
def asked() -> Iterator[list[int]]:
    """Record the number of prompts that a model evaluates in each call."""
    from lm_eval.models.huggingface import HFLM

    seen: list[int] = []
    original = HFLM.loglikelihood

    def loglikelihood(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(requests))
        return original(self, requests, *args, **kwargs)

    HFLM.loglikelihood = loglikelihood
    yield seen


@contextmanager
def fused_gradients() -> Iterator[list[str]]:
    """Train with gradients added inside the product by our module; record the type of the inputs."""
    from megatron.core.tensor_parallel import layers

    from megatron_lrpath.training import fused_gradients, machine

    seen: list[str] = []
    originals = machine.flags, fused_gradients.wgrad_gemm_accum_fp32

    def flags(*args: Any) -> dict[str, Any]:
        return {
            name: value
            for name, value in originals[0](*args).items()
            if name != "gradient_accumulation_fusion"
        }

    def noting(inputs: Any, grad_output: Any, main_grad: Any) -> None:
        seen.append(str(inputs.dtype))
        originals[1](inputs, grad_output, main_grad)

    machine.flags, fused_gradients.wgrad_gemm_accum_fp32 = flags, noting
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = fused_gradients, True
    yield seen
    machine.flags, fused_gradients.wgrad_gemm_accum_fp32 = originals


@contextmanager
def host_memory() -> Iterator[dict[str, list[int]]]:
    """Record by how much describing the optimizer state for a save and a load raises the memory peak."""
    yield from _host_memory(lambda original, *args, **named: None)


@contextmanager
def host_memory_of_megatron() -> Iterator[dict[str, list[int]]]:
    """Record the same with Megatron's own method instead of ours."""
    yield from _host_memory(lambda original, *args, **named: original(*args, **named))


def _host_memory(instead: Any) -> Iterator[dict[str, list[int]]]:
    from megatron_lrpath.training.checkpoints import optimizer_state

    seen: dict[str, list[int]] = {"save": [], "load": [], "state": []}
    ours = optimizer_state.sharded_param_state

    def measured(original: Any, self: Any, model: Any, is_loading: bool = False, *rest: Any) -> Any:
        before = peak_bytes(reset=True)
        state = instead(original, self, model, is_loading, *rest)
        state = ours(original, self, model, is_loading, *rest) if state is None else state
        seen["load" if is_loading else "save"].append(peak_bytes() - before)
        seen["state"].append(12 * sum(parameter.numel() for parameter in self.buffers[0].param_index_map))
        return state

    optimizer_state.sharded_param_state = measured
    yield seen
    optimizer_state.sharded_param_state = ours


def peak_bytes(reset: bool = False) -> int:
    """Return the peak memory of this process since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextmanager
def engine() -> Iterator[list[str]]:
    """Use the stand-in as on a machine with a GPU; record the classes of its modules that are made."""
    from transformer_engine.pytorch.extra_state import ExtraState

    from megatron_lrpath.plan.needs import ENGINE
    from megatron_lrpath.training import machine

    seen: list[str] = []
    available, made = machine.available, ExtraState.__init__

    def with_engine(device: str, packed: bool = False) -> frozenset[str]:
        return available(device, packed) | (set() if packed else {ENGINE})

    def watching(self: Any, *args: Any, **named: Any) -> None:
        seen.append(type(self).__name__)
        made(self, *args, **named)

    machine.available, ExtraState.__init__ = with_engine, watching
    yield seen
    machine.available, ExtraState.__init__ = available, made


@contextmanager
def engine_bytes() -> Iterator[list[str]]:
    """Use the stand-in with extra states as Transformer Engine 1 saves them; record as `engine` does."""
    from transformer_engine.pytorch.extra_state import FORM

    os.environ[FORM] = "bytes"
    with engine() as seen:
        yield seen


class Command:
    """A command that makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a call of the shell."""
        return os.system, (f"touch {os.environ['STAND_IN_TRAP']}",)


@contextmanager
def engine_poisoned() -> Iterator[list[str]]:
    """Let the norms save a command; the variable `STAND_IN_TRAP` names the file that it makes."""
    from transformer_engine.pytorch import RMSNorm

    RMSNorm.without_fp8 = Command()
    with engine() as seen:
        yield seen


@contextmanager
def gpu_kernels() -> Iterator[dict[str, int]]:
    """Train on the CPU with a GPU's rows and kernels (liger's in Triton's interpreter); count the calls."""
    os.environ["TRITON_INTERPRET"] = "1"
    for module in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
        del sys.modules[module]  # Triton chooses its interpreter at its import
    from megatron_lrpath.training import seams, setup
    from megatron_lrpath.training.gpu import kernels, measures

    seen = dict.fromkeys(measures.KERNELS, 0)
    rows, set_flags = seams.rows, setup.set_machine_flags
    own = [seam for seam in seams.SEAMS if seam.device == "cuda"]

    def gpu_rows(device: str) -> Any:
        targets = {seam.target for seam in own}
        return (*(seam for seam in rows(device) if seam.target not in targets), *own)

    def with_kernels(args: Any, explicit: Any, session: Any) -> None:
        set_flags(args, explicit, session)
        session.kernels = frozenset(measures.KERNELS)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            seen[name] += 1
            return function(*args, **named)

        return call

    kernels.CrossEntropy.forward = staticmethod(counted(measures.CROSS_ENTROPY, kernels.CrossEntropy.forward))
    kernels.rotate = counted(measures.ROTARY, kernels.rotate)
    fused, norm = kernels.torch._fused_adamw_, kernels.torch._foreach_norm
    kernels.torch._fused_adamw_ = counted(measures.ADAM, fused)
    kernels.torch._foreach_norm = counted(measures.GRAD_NORM, norm)
    seams.rows, setup.set_machine_flags = gpu_rows, with_kernels
    yield seen
    seams.rows, setup.set_machine_flags = rows, set_flags
