"""A save of the optimizer has Megatron's tensors bit for bit, each parameter from one rank's memory only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lrpath.training.checkpoints.optimizer_state import parts_of
from tests.support.states import states
from tests.support.training_fixtures import MODEL, history, make_plan, run_words, train

pytestmark = pytest.mark.slow

TP2 = ("--tensor-model-parallel-size", "2")
TIED = {**MODEL, "untie_embeddings_and_output_weights": False}
EXPERTS = {**MODEL, "num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
SHARES: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "dp2": (2, (), {}),
    "dp4-bf16": (4, ("--micro-batch-size", "1"), {"megatron": {"bf16": True}}),
    "tp2-dp2": (4, TP2, {}),
    "pp2-dp2-tied": (4, ("--pipeline-model-parallel-size", "2"), {"model": TIED}),
    "experts": (4, ("--expert-model-parallel-size", "2", "--micro-batch-size", "1"), {"model": EXPERTS}),
    "one-writer": (2, ("--no-ckpt-fully-parallel-save",), {}),
    "shared-load": (2, ("--ckpt-fully-parallel-load",), {}),
}
SMALL_BUCKETS = ("--overlap-grad-reduce", "--ddp-bucket-size", "1000")


def saved(
    folder: Path, nproc: int, flags: tuple[str, ...], changes: dict[str, Any], probe: str | None
) -> Any:
    """Train three steps and save; return the checkpoint's folder and the probe's records."""
    plan = make_plan(folder, (6, 6), **changes)
    argv = run_words(plan, "ours", "main", *flags, "--exit-interval", "3")
    outcome = train(argv, nproc, probe=probe).ok()
    return folder / "runs/ours/main/checkpoints/iter_0000003", outcome.probed


def tensor_bytes(checkpoint: Path) -> int:
    """Return the bytes of the files with tensors."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))


@pytest.mark.parametrize("share", SHARES)
def test_a_checkpoint_equals_megatrons_own_and_resumes(tmp_path: Path, share: str) -> None:
    nproc, flags, changes = SHARES[share]
    ours, _ = saved(tmp_path / "ours", nproc, flags, changes, None)
    megatrons, _ = saved(tmp_path / "megatrons", nproc, flags, changes, "host_memory_of_megatron")
    one, other = states(ours, megatrons)
    assert one == other
    assert tensor_bytes(ours) == pytest.approx(tensor_bytes(megatrons), rel=0.01)  # zip headers
    lines = []
    elsewhere = (flags, nproc) if share == "experts" else ((), 1)  # one process has one optimizer for all
    for folder, layout, processes in (("ours", flags, nproc), ("megatrons", *elsewhere)):
        train(run_words(tmp_path / folder / "plan.yaml", "ours", "main", *layout), processes).ok()
        lines.append([row["loss"] for row in history(tmp_path / folder / "runs/ours/main")])
    assert lines[0] == pytest.approx(lines[1], rel=1e-5 if "megatron" not in changes else 5e-3)


def test_a_training_with_padded_buckets_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Small buckets have padding between them, which Megatron 0.19 omits when it reads states from them."""
    saved(tmp_path, 2, SMALL_BUCKETS, {}, None)
    argv = run_words(tmp_path / "plan.yaml", "ours", "main", *SMALL_BUCKETS)
    train(argv, 2).ok()
    stopped = states(tmp_path / "runs/ours/main/checkpoints/iter_0000009")
    make_plan(tmp_path / "whole", (6, 6))
    train(run_words(tmp_path / "whole/plan.yaml", "ours", "main", *SMALL_BUCKETS), 2).ok()
    assert stopped == states(tmp_path / "whole/runs/ours/main/checkpoints/iter_0000009")


WIDE = {**MODEL, "hidden_size": 512, "ffn_hidden_size": 1024}


def test_no_rank_holds_the_whole_state_in_host_memory(tmp_path: Path) -> None:
    """Megatron's own way is measured as well, to test the measurement."""
    flags = ("--micro-batch-size", "1")
    peaks = {}
    for probe in ("host_memory", "host_memory_of_megatron"):
        _, seen = saved(tmp_path / probe, 4, flags, {"model": WIDE}, probe)
        peaks[probe] = [max(rank["save"]) / rank["state"][0] for rank in seen]
    assert min(peaks["host_memory_of_megatron"]) > 1
    assert max(peaks["host_memory"]) < 0.5


@pytest.mark.parametrize(
    ("start", "end", "parts"),
    [
        (100, 110, {0: (0, 10)}),
        (115, 145, {0: (0, 5), 1: (5, 25), 2: (25, 30)}),
        (140, 160, {2: (0, 20)}),
        (120, 140, {1: (0, 20)}),
    ],
)
def test_a_bucket_is_cut_across_its_parameters(start: int, end: int, parts: dict[int, Any]) -> None:
    """The bucket of 80 elements begins at 100 and is cut for four ranks."""
    bucket = SimpleNamespace(offset=100, grad_data=SimpleNamespace(numel=lambda: 80))
    buffer = SimpleNamespace(
        param_index_map={"one": (start, end, 0)},
        buckets=[bucket],
        data_parallel_group=SimpleNamespace(size=lambda: 4),
    )
    assert {rank: (part.start, part.stop) for rank, part in parts_of(buffer, "one").items()} == parts
