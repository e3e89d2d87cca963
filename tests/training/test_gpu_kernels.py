"""The kernels of --gpu-kernels on the CPU: their choice, and numerics (liger's in Triton's interpreter)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lrpath.errors import UserError
from megatron_lrpath.training.gpu import measures
from megatron_lrpath.training.gpu.measures import (
    ADAM,
    CROSS_ENTROPY,
    GRAD_NORM,
    KERNELS,
    NONE,
    ROTARY,
    Setting,
)
from tests.support import ROOT
from tests.support.training_fixtures import history, make_plan, run_words, train
from tests.training.test_training_branch import refusal

# ---------------------------------------------------------------- choice of kernels


def arguments(**given: Any) -> Namespace:
    """Return Megatron's arguments of a LLaMA model in bf16 on one GPU."""
    usual = {
        "bf16": True,
        "deterministic_mode": False,
        "tensor_model_parallel_size": 1,
        "cross_entropy_loss_fusion": False,
        "position_embedding_type": "rope",
        "apply_rope_fusion": False,
        "rotary_interleaved": False,
        "multi_latent_attention": False,
        "rotary_percent": 1.0,
        "disable_jit_fuser": False,
        "optimizer": "adam",
        "optimizer_cpu_offload": False,
        "gpu_kernels": None,
    }
    return Namespace(**usual | given)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, set()),
        ({"bf16": False}, {CROSS_ENTROPY}),
        ({"deterministic_mode": True}, {CROSS_ENTROPY}),
        ({"tensor_model_parallel_size": 2}, {CROSS_ENTROPY}),
        ({"cross_entropy_loss_fusion": True}, {CROSS_ENTROPY}),
        ({"position_embedding_type": "learned_absolute"}, {ROTARY}),
        ({"apply_rope_fusion": True}, {ROTARY}),
        ({"rotary_percent": 0.5}, {ROTARY}),
        ({"disable_jit_fuser": True}, {ROTARY}),
        ({"optimizer": "sgd"}, {ADAM}),
        ({"optimizer_cpu_offload": True}, {ADAM}),
    ],
)
def test_a_kernel_is_left_out_with_its_reason(given: dict[str, Any], left: set[str]) -> None:
    kernels, why = measures.choose(None, Setting(arguments(**given)))
    assert set(why) == left
    assert kernels == set(KERNELS) - left
    for name in left:
        with pytest.raises(UserError, match=f"--gpu-kernels {name}: "):
            choose(gpu_kernels=[name, GRAD_NORM], **given)


def choose(off: frozenset[str] = frozenset(), is_run: bool = True, **given: Any) -> tuple[set[str], bool]:
    """Return the kernels, and whether Megatron's fused cross-entropy is used."""
    from megatron_lrpath.training.options.from_machine import choose_kernels

    args = arguments(**given)
    return set(choose_kernels(args, off, is_run)), args.cross_entropy_loss_fusion


def test_without_liger_megatrons_fusion_is_used_in_bf16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose() == (set(KERNELS), False)
    monkeypatch.setattr(measures, "LIGER", "liger-kernel-that-is-not-there")
    others = set(KERNELS) - {CROSS_ENTROPY}
    capsys.readouterr()
    assert choose() == (others, True)
    shown = capsys.readouterr().err
    assert "rotary, adam, grad_norm, Megatron's fused cross-entropy" in shown
    assert "cross_entropy: the package liger-kernel-that-is-not-there is not installed" in shown
    assert choose(bf16=False) == (others, False)
    assert choose(deterministic_mode=True) == (others, False)  # Megatron asserts it
    assert choose(frozenset({"cross_entropy_loss_fusion"})) == (others, False)
    assert choose(gpu_kernels=[NONE]) == (set(), False)
    assert choose(gpu_kernels=[ADAM]) == ({ADAM}, False)
    assert choose(is_run=False) == (set(), False)  # plain Megatron
    assert choose(is_run=False, gpu_kernels=[ADAM]) == ({ADAM}, False)


def test_with_a_fused_optimizer_its_adam_and_norm_are_used() -> None:
    kernels, why = measures.choose(None, Setting(arguments(), "Apex"))
    assert kernels == {CROSS_ENTROPY, ROTARY}
    assert why == {ADAM: "Apex's is used", GRAD_NORM: "Apex's is used"}


def test_another_liger_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures.metadata, "version", lambda name: "0.9.1")
    assert "calls the kernel of liger-kernel>=0.8.5,<0.9" in measures.liger_problem()


def test_none_cannot_be_combined_with_kernels() -> None:
    with pytest.raises(UserError, match="none: it cannot be combined"):
        choose(gpu_kernels=[NONE, ADAM])


def test_on_the_cpu_they_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (4,))
    message = refusal(run_words(plan, "ours", "main", "--gpu-kernels", ROTARY))
    assert "--gpu-kernels rotary needs a GPU: the CPU has kernels of its own" in message


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rotary_embeddings_are_megatrons(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compilation, they are as close to fp32 in bf16 as a single rounding allows."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_lrpath.training.gpu import kernels
    from megatron_lrpath.training.session import Session

    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(12, 2, 3, 16, generator=generator).to(kind)
    angles = torch.rand(12, 1, 1, 8, generator=generator) * 20
    freqs = torch.cat((angles, angles), -1)
    upstream = torch.randn(states.shape, generator=generator).to(kind)
    config = Namespace(rotary_interleaved=False, multi_latent_attention=False)
    exact = states.float().clone().requires_grad_()
    wanted = _apply_rotary_pos_emb_bshd(exact, freqs, mscale=1.25)
    wanted.backward(upstream.float())
    ours = states.clone().requires_grad_()
    session = Session("cuda", kernels=frozenset({ROTARY}))
    found = kernels.rotary(session, pytest.fail, ours, freqs, config, None, 1.25)
    found.backward(upstream)
    assert found.dtype == kind
    assert ours.grad is not None
    assert exact.grad is not None
    within = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    assert torch.allclose(found.float(), wanted, **within)
    assert torch.allclose(ours.grad.float(), exact.grad, **within)
    special = {"cu_seqlens": torch.tensor([0, 12])}
    assert kernels.rotary(session, lambda *_: "Megatron's", ours, freqs, config, **special) == "Megatron's"
    assert kernels.rotary(Session("cuda"), lambda *_: "Megatron's", ours, freqs, config) == "Megatron's"
    latent = Namespace(rotary_interleaved=False, multi_latent_attention=True)
    assert kernels.rotary(session, lambda *_: "Megatron's", ours, freqs, latent) == "Megatron's"


def test_the_norm_of_the_gradients_is_megatrons() -> None:
    from megatron.core.utils import local_multi_tensor_l2_norm

    from megatron_lrpath.training.gpu.kernels import l2_norm
    from megatron_lrpath.training.session import Session

    generator = torch.Generator().manual_seed(4)
    gradients = [torch.randn(size, generator=generator) for size in (5, 700, 1, 64)]
    session = Session("cuda", kernels=frozenset({GRAD_NORM}))
    norm, each = l2_norm(session, local_multi_tensor_l2_norm, 1, torch.zeros(1), [gradients], False)
    assert norm.shape == (1,)  # Megatron reduces it over the ranks, then reads it
    assert each is None
    assert norm.item() == pytest.approx(torch.cat(gradients).double().norm().item(), rel=1e-6)
    others = lambda *_: "Apex'"  # noqa: E731
    assert l2_norm(session, others, 1, torch.zeros(1), [gradients], False) == "Apex'"


def test_adams_update_is_fused_and_its_step_is_where_the_weights_are() -> None:
    from megatron_lrpath.training.gpu.kernels import init_group
    from megatron_lrpath.training.session import Session

    weight = torch.nn.Parameter(torch.ones(3, device="meta"))  # another device than the step's
    adam = torch.optim.AdamW([weight], lr=0.1)
    adam.state[weight]["step"] = torch.tensor(7.0)
    group = adam.param_groups[0]
    init_group(Session("cuda"), lambda *_: None, adam, group)
    assert (group["fused"], adam.state[weight]["step"].device.type) == (None, "cpu")
    init_group(Session("cuda", kernels=frozenset({ADAM})), lambda *_: None, adam, group)
    assert (group["fused"], group["foreach"], adam.state[weight]["step"].device.type) == (True, False, "meta")


@pytest.mark.slow
def test_ligers_cross_entropy_is_torchs_in_fp32() -> None:
    """It runs in Triton's interpreter, which must be chosen before liger is imported."""
    pytest.importorskip("triton", reason="torch's CPU build has no Triton")
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_errors", "cpu"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])["cross_entropy"]
    assert len(found) == 2
    for row in found:
        check_cross_entropy(row, 2**-7 + 2**-8)  # the interpreter rounds to bf16 towards zero


def check_cross_entropy(row: dict[str, Any], gradient: float) -> None:
    """Check a row of `kernel_errors` against rounding; `gradient` is the largest relative error."""
    assert row["unchanged"]  # without gradients, as in an evaluation
    assert row["in_place"]
    assert row["type"] == "torch.float32"
    assert max(row["loss"], row["evaluated"]) < 1e-5
    assert row["gradient"] < gradient
    assert row["masked"] == 0.0
    assert row["repeats"]


@pytest.mark.slow
def test_a_training_with_them_equals_one_without_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="torch's CPU build has no Triton")
    losses = {}
    for name, probe, stops in (
        ("without", None, (None,)),
        ("with", "gpu_kernels", (None,)),
        ("stopped", "gpu_kernels", ("2", None)),
    ):
        plan = make_plan(tmp_path / name, (8,), megatron={"bf16": True})  # a main path of 4 steps
        for stop in stops:
            outcome = train(
                run_words(plan, "ours", "main", *(["--exit-interval", stop] if stop else [])), probe=probe
            )
        if probe is not None:
            assert all(count > 0 for count in outcome.ok().probed[0].values()), outcome.probed
        losses[name] = [line["loss"] for line in history(plan.parent / "runs/ours/main")]
        assert len(losses[name]) == 4
    assert losses["with"] == pytest.approx(losses["without"], rel=2e-3)
    assert losses["stopped"] == losses["with"]
