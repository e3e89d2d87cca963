"""The CPU backend: the names it replaces, that it changes no operation, and kernels equal to Megatron's."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_lrpath.errors import UserError
from megatron_lrpath.training.cpu import kernels
from megatron_lrpath.training.machine import DEVICES, choose_device
from tests.support import ROOT
from tests.support.training_fixtures import begin_process_group, launch


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(wanted) for wanted in DEVICES] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(wanted) for wanted in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match=r"torch sees no GPU here.*--device cpu"):
        choose_device("cuda")


CHANGED = """
import inspect, json, torch
owners = {"torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module,
          "functional": torch.nn.functional, "Adam": torch.optim.Adam, "ops": torch.ops.aten,
          "autograd": torch.autograd, "special": torch.special, "linalg": torch.linalg,
          "distributed": torch.distributed}
def names(owner):
    return {name: inspect.getattr_static(owner, name, None) for name in dir(owner)}
before = {owner: names(value) for owner, value in owners.items()}
from megatron_lrpath.training.machine import activate
activate("cpu")
changed = sorted(f"{owner}.{name}" for owner, value in owners.items() for name, one in names(value).items()
                 if name in before[owner] and before[owner][name] is not one)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
print(json.dumps({"changed": changed, "modes": len(_get_current_function_mode_stack()),
                  "dispatch": len(_get_current_dispatch_mode_stack())}))
"""


def test_no_operation_is_wrapped_and_no_mode_is_active() -> None:
    """Only factories, moves between devices and torch.cuda's own names are replaced in torch."""
    command = [sys.executable, "-W", "ignore", "-c", CHANGED]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(answer.stdout)
    assert (found["modes"], found["dispatch"]) == (0, 0)
    others = {name for name in found["changed"] if not name.startswith("cuda.")}
    from megatron_lrpath.training.cpu.backend import FACTORIES

    moves = {"Tensor.cuda", "Tensor.type", "Tensor.to", "Module.cuda"}
    assert others == moves | {"torch.compile", "Adam._init_group"} | {f"torch.{name}" for name in FACTORIES}


def answers(argv: list[str]) -> None:
    """Check the replacements for the names that Megatron calls for a GPU, in a separate process."""
    from megatron_lrpath.training.cpu.backend import FACTORIES

    cpu = torch.device("cpu")
    for name in set(FACTORIES) - {"Generator"}:
        arguments: dict[str, Any] = {
            "tensor": ([1.0],), "as_tensor": ([1.0],), "full": ((2,), 1.0), "randint": (3, (2,)), "arange": (3,),
            "linspace": (0, 1, 3), "eye": (2,), "empty_strided": ((2,), (1,)), "full_like": (torch.ones(2), 1.0),
        }  # fmt: skip
        given = arguments.get(name, (torch.ones(2),) if name.endswith("_like") else (2,))
        for device in ("cuda", "cuda:0", torch.device("cuda", 0), "cpu", None, cpu):
            assert getattr(torch, name)(*given, device=device).device == cpu, (name, device)
        assert getattr(torch, name)(*given).device == cpu
    assert torch.zeros(2, device="meta").device.type == "meta", "other devices are left alone"
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor
    assert module.cuda() is module
    assert tensor.to("cuda") is tensor
    assert tensor.to(device="cuda", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert module.to("cuda").weight.device == cpu
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.type(torch.bfloat16).dtype == torch.bfloat16
    assert not isinstance(tensor, torch.cuda.FloatTensor | torch.cuda.HalfTensor)
    assert torch.Generator(device="cuda").manual_seed(1).device == cpu
    assert (torch.cuda.device_count(), torch.cuda.get_device_capability()) == (1, (0, 0))
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 1 << 20
    random_numbers_and_time()


def random_numbers_and_time() -> None:
    """Check that the device's generator is the CPU's, and that events measure time."""
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.rand(300, 300).matmul(torch.rand(300, 300))
    torch.cuda.current_stream().record_event(end)
    torch.cuda.synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0


def test_megatrons_questions_to_a_gpu_are_answered() -> None:
    launch("tests.training.test_backend_cpu:answers", []).ok()


def fused_adam(argv: list[str]) -> None:
    """Check that Adam and AdamW use the fused kernel for any loaded groups, in a separate process."""
    from torch.profiler import profile

    for kind in (torch.optim.Adam, torch.optim.AdamW):
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 64)), torch.nn.Parameter(torch.linspace(-1, 1, 64))
        ours, plain = (kind([weight], lr=0.1, weight_decay=0.1) for weight in weights)
        original = kind._init_group.__wrapped__
        for step in range(4):
            for weight in weights:
                weight.grad = torch.sin(weight.detach() + step)
            with profile() as watched:
                ours.step()
            assert "aten::_fused_adam" in {
                event.key.split("w_")[0].rstrip("_") for event in watched.key_averages()
            }
            kind._init_group, replaced = original, kind._init_group
            plain.step()
            kind._init_group = replaced
            ours.load_state_dict({**ours.state_dict(), "param_groups": plain.state_dict()["param_groups"]})
        torch.testing.assert_close(*weights)


def test_adam_is_fused_also_after_loading_groups_that_are_not() -> None:
    launch("tests.training.test_backend_cpu:fused_adam", []).ok()


def derivatives(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of `function` and the gradients of its floating inputs, for fixed output weights."""
    leaves = [one.detach().clone().requires_grad_(one.is_floating_point()) for one in inputs]
    output = function(*leaves)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    (output * weight).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Assert that all results agree to the rounding of `dtype`."""
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
def test_cross_entropy_is_torchs_at_any_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    logits, target = 5 * torch.randn(37, 50), torch.randint(50, (37,))
    ours = derivatives(lambda one: kernels.CrossEntropy.apply(one, target), logits)
    assert_same(
        ours, derivatives(lambda one: F.cross_entropy(one, target, reduction="none"), logits), torch.float32
    )


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits, target = (5 * torch.randn(16, 300)).bfloat16(), torch.randint(300, (16,))
    ours, grad = derivatives(lambda one: kernels.CrossEntropy.apply(one, target), logits)
    exact, exact_grad = derivatives(
        lambda one: F.cross_entropy(one, target, reduction="none"), logits.double()
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad.bfloat16(), rtol=1e-2, atol=1e-7)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]])
    loss, grad = derivatives(lambda one: kernels.CrossEntropy.apply(one, torch.tensor([0, 1])), logits)
    assert loss.tolist() == [0.0, 0.0]
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_silu_of_the_gate_times_the_rest(dtype: torch.dtype) -> None:
    states = torch.randn(6, 2, 40).to(dtype)

    def plain(one: torch.Tensor) -> torch.Tensor:
        gate, up = one.chunk(2, -1)
        return F.silu(gate) * up

    assert_same(derivatives(kernels.SwiGLU.apply, states), derivatives(plain, states), dtype)


def against_megatron(argv: list[str]) -> None:
    """Compare our wrappers with the functions of Megatron that they replace, in a separate process."""
    from types import SimpleNamespace

    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_lrpath.training import seams
    from megatron_lrpath.training.session import Session

    seams.apply(Session("cpu"))
    begin_process_group()
    parallel_state.initialize_model_parallel()
    functions = {
        row.target.rpartition(":")[2]: (row.original(), row.original().__wrapped__)
        for row in seams.SEAMS
        if "cpu.kernels" in row.replacement
    }
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    config = SimpleNamespace(
        rotary_interleaved=False, multi_latent_attention=False, apply_rope_fusion=False, mrope_section=None
    )
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = torch.randn(8, 2, 30).to(dtype), torch.randint(30, (8, 2))
        losses = [derivatives(lambda x, f=f, y=labels: f(x, y, tp_group=tensor_parallel), logits)
                  for f in functions["vocab_parallel_cross_entropy"]]  # fmt: skip
        assert_same(*losses, dtype)
        gates = [derivatives(lambda x, f=f: f(x, None), torch.linspace(-2, 2, 96).view(4, 2, 12).to(dtype))
                 for f in functions["bias_swiglu_impl"]]  # fmt: skip
        assert_same(*gates, dtype)
        for percent in (1.0, 0.5):
            angles = RotaryEmbedding(16, percent, use_cpu_initialization=True)(8)
            states = torch.randn(8, 2, 3, 16).to(dtype)
            turned = [derivatives(lambda x, f=f, a=angles: f(x, a, config, mscale=1.5), states)
                      for f in functions["apply_rotary_pos_emb"]]  # fmt: skip
            assert_same(*turned, dtype)
    collectives(functions)


def collectives(functions: dict[str, Any]) -> None:
    """Check that one rank's in-place collectives keep the values and all others still copy them."""
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        ours = functions[name][0]
        buffer, copy = torch.arange(6.0), torch.zeros(6)
        assert ours(buffer, buffer.view(-1), group=torch.distributed.group.WORLD) is None
        assert buffer.tolist() == [0, 1, 2, 3, 4, 5]
        ours(copy, buffer, group=torch.distributed.group.WORLD)
        assert torch.equal(copy, buffer)
        ours(buffer, buffer, group=torch.distributed.group.WORLD, async_op=True).wait()


def test_the_kernels_are_megatrons_functions_to_rounding() -> None:
    launch("tests.training.test_backend_cpu:against_megatron", []).ok()
