"""The argument group "learning-rate path switching" without a plan, its refusals, and plain Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.schedule import LRPath, Schedule
from tests.support.training_fixtures import make_plan, run_words, train
from tests.training.test_training_branch import refusal
from tests.training.test_training_rates import words_without_plan

RATES = ("--lr", "0.01", "--min-lr", "0.001")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and a plan file; only the plan's model and data are used."""
    folder = tmp_path_factory.mktemp("arguments")
    make_plan(folder, (12,))
    return folder


@pytest.fixture(scope="module")
def argv(folder: Path) -> list[str]:
    """Return the arguments of a launch script for model, data, batch and optimizer."""
    return words_without_plan(folder / "plan.yaml", folder)


@pytest.fixture(scope="module")
def main(folder: Path, argv: list[str]) -> Path:
    """Return the checkpoints of a main path of 8 steps without a plan, which keeps steps 4 and 6."""
    own = folder / "main"
    path = ["--lr-path", "main", "--lr-warmup-iters", "2", "--train-iters", "8"]
    outcome = train(
        [*argv, *RATES, *path, "--lr-path-keep-steps", "4", "6", "--save", str(own)], probe="rates"
    )
    rates = [groups[0] for groups in outcome.ok().probed[0]]
    assert rates == expected(LRPath(schedule("cosine", 2), "plateau", 0, 8, warmup=2))
    assert complete_steps(own) == [4, 6, 8]
    return own


def schedule(style: str, warmup: int = 0, **knobs: object) -> Schedule:
    """Return a schedule between the rates of these tests."""
    return Schedule(style=style, max_lr=0.01, min_lr=0.001, warmup=warmup, **knobs)  # type: ignore[arg-type]


def expected(path: LRPath) -> list[float]:
    """Return the rate of every step of a path in steps."""
    return [path.lr_at(step) for step in range(path.start, path.end)]


def used(argv: Sequence[str]) -> list[float]:
    """Return the rates that a training really used."""
    return [groups[0] for groups in train(argv, probe="rates").ok().probed[0]]


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        (["--lr-path-decay-iters", "5"], LRPath(schedule("cosine"), "branch", 4, 9)),
        (["--train-iters", "9"], LRPath(schedule("cosine"), "branch", 4, 9)),
        (["--train-iters", "9", "--lr-path-decay-iters", "5"], LRPath(schedule("cosine"), "branch", 4, 9)),
        (
            ["--lr-path-decay-iters", "4", "--lr-path-style", "multi-step"],
            LRPath(schedule("multi-step"), "branch", 4, 8),
        ),
        (
            [
                "--lr-path-decay-iters",
                "4",
                "--lr-path-style",
                "wsd",
                "--lr-path-wsd-decay-shape",
                "minus-sqrt",
            ],
            LRPath(schedule("wsd", wsd_decay_shape="minus-sqrt"), "branch", 4, 8),
        ),
        (
            ["--lr-path-decay-iters", "4", "--lr-path-cycle-iters", "8"],
            LRPath(schedule("cosine"), "branch", 4, 8, cycle=8),
        ),
    ],
)
def test_a_branch_without_a_plan(
    argv: list[str], main: Path, tmp_path: Path, extra: list[str], path: LRPath
) -> None:
    parent = ["--lr-path", "branch", "--lr-path-parent", str(main), "--lr-path-parent-step", "4"]
    rates = used([*argv, *RATES, *parent, *extra, "--save", str(tmp_path / "own")])
    assert rates == expected(path)
    assert complete_steps(tmp_path / "own") == [path.end]
    assert complete_steps(main) == [4, 6, 8]


@pytest.mark.parametrize(
    ("variant", "path"),
    [
        ("reset-max", LRPath(schedule("knee", knee_explore=0.25), "whole", 6, 10)),
        ("rewarm-max", LRPath(schedule("knee", 1, knee_explore=0.25), "whole", 6, 10, warmup=1)),
        ("keep-min", LRPath(schedule("knee"), "floor", 6, 10)),
    ],
)
def test_a_continual_run_without_a_plan(
    argv: list[str], main: Path, tmp_path: Path, variant: str, path: LRPath
) -> None:
    parent = ["--lr-path", "continual", "--lr-path-parent", str(main), "--lr-path-parent-step", "6"]
    kind = ["--lr-path-cpt-variant", variant, "--lr-path-style", "knee", "--lr-path-knee-explore", "0.25"]
    length = ["--lr-path-decay-iters", "4", "--lr-warmup-iters", "1", "--save", str(tmp_path / "own")]
    assert used([*argv, *RATES, *parent, *kind, *length]) == expected(path)


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        ([], LRPath(schedule("cosine", 2), "whole", 0, 6, warmup=2)),
        (["--lr-path-cycle-iters", "inf"], LRPath(schedule("cosine", 2), "whole", 0, 6, 2, float("inf"))),
        (
            ["--lr-path-style", "multi-step", "--lr-path-multi-step-fractions", "0.25", "0.5"],
            LRPath(schedule("multi-step", 2, multi_step_fractions=(0.25, 0.5)), "whole", 0, 6, warmup=2),
        ),
        (
            ["--lr-path-style", "wsd", "--lr-path-wsd-decay-fraction", "0.5"],
            LRPath(schedule("wsd", 2, wsd_decay_fraction=0.5), "whole", 0, 6, warmup=2),
        ),
    ],
)
def test_a_run_from_scratch_without_a_plan(
    argv: list[str], tmp_path: Path, extra: list[str], path: LRPath
) -> None:
    kind = ["--lr-path", "scratch", "--lr-warmup-iters", "2", "--train-iters", "6", *extra]
    assert used([*argv, *RATES, *kind, "--save", str(tmp_path / "own")]) == expected(path)


def test_a_branch_without_a_plan_is_resumed_at_its_second_start(
    argv: list[str], main: Path, tmp_path: Path
) -> None:
    parent = ["--lr-path", "branch", "--lr-path-parent", str(main), "--lr-path-parent-step", "4"]
    own = ["--lr-path-decay-iters", "4", "--save", str(tmp_path / "own"), "--load", str(tmp_path / "own")]
    start = [*argv, *RATES, *parent, *own]
    rates = used([*start, "--exit-interval", "6"]) + used(start)
    assert rates == expected(LRPath(schedule("cosine"), "branch", 4, 8))


BRANCH = ["--lr-path", "branch", "--lr-path-parent", "MAIN", "--lr-path-parent-step", "4"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--lr-path", "branch"], "--lr-path branch needs --lr-path-parent"),
        (["--lr-path", "branch", "--lr-path-parent", "MAIN"], "--lr-path-parent-step (the step"),
        (["--lr-path", "main", "--lr-path-parent", "MAIN"], "starts from random weights"),
        (["--lr-path", "main"], "must end after step 0: give --train-iters or --lr-path-decay-iters"),
        ([*BRANCH, "--train-iters", "4"], "must end after step 4"),
        (
            [*BRANCH, "--train-iters", "9", "--lr-path-decay-iters", "4"],
            "ends the run at step 8, --train-iters at 9",
        ),
        (
            [*BRANCH, "--train-samples", "64", "--lr-path-decay-iters", "4"],
            "--train-samples cannot be given with --lr-path; in its place: --train-iters (a path counts in steps",
        ),
        ([*BRANCH, "--lr-path-decay-iters", "4", "--save", "MAIN"], "never writes into its parent"),
        (
            [
                "--lr-path",
                "branch",
                "--lr-path-parent",
                "MAIN",
                "--lr-path-parent-step",
                "5",
                "--train-iters",
                "9",
            ],
            "no checkpoint of step 5; it has steps 4, 6, 8",
        ),
        ([*BRANCH, "--lr-path-decay-iters", "4", "--num-layers", "3"], "num_layers is 2 there and 3 here"),
        ([*BRANCH, "--lr-path-decay-iters", "4", "--lr-path-cycle-iters", "2"], "cycle"),
        ([*BRANCH, "--lr-path-decay-iters", "4", "--load", "ELSEWHERE"], "leave --load out"),
        (
            [*BRANCH, "--lr-path-decay-iters", "4", "--lr-decay-style", "cosine"],
            "in its place: --lr-path-style",
        ),
        ([*BRANCH, "--lr-path-decay-iters", "4", "--finetune"], "--finetune cannot be given with --lr-path"),
        (["--lr-path", "scratch", "--train-iters", "4", "--lr-warmup-iters", "4"], "warm"),
        (
            ["--lr-path", "scratch", "--train-iters", "4", "--lr-path-multi-step-fractions", "0.9", "0.8"],
            "--lr-path scratch: ",
        ),
        (
            ["--lr-path-style", "knee", "--train-iters", "4"],
            "--lr-path-style has no effect without --lr-path",
        ),
        (
            ["--paradigm", "ours", "--train-iters", "4"],
            "--paradigm ours names a run of a plan: give --plan too",
        ),
        (["--lr-path", "sideways"], "invalid choice: 'sideways'"),
        (["--no-such-argument"], "unrecognized arguments: --no-such-argument"),
        (["--device", "cuda", "--train-iters", "4"], "--device cuda: torch sees no GPU here"),
    ],
)
def test_missing_or_contradictory_arguments_are_refused(
    argv: list[str], main: Path, tmp_path: Path, extra: list[str], said: str
) -> None:
    own = [] if "--save" in extra else ["--save", str(tmp_path / "own")]
    given = [{"MAIN": str(main), "ELSEWHERE": str(tmp_path)}.get(word, word) for word in extra]
    message = refusal([*argv, *RATES, *own, *given])
    assert said in message
    assert message.count("\n") == 1, "one line"
    assert not (tmp_path / "own").exists() or not complete_steps(tmp_path / "own")


PATH = ["--lr-path", "branch", "--no-save-optim", "--log-intervall", "4", "--fp8-format", "e4m3"]

# arguments in addition to model and data, and the beginning of each line of the message
TOGETHER = {
    "--lr-path": (
        [*PATH, "--dataloader-type", "cyclic"],
        [
            "unrecognized arguments: --log-intervall 4 (did you mean '--log-interval'?)",
            "--no-save-optim cannot be given with --lr-path",
            "--dataloader-type cyclic cannot be given with --lr-path",
            "--fp8-format e4m3 needs Transformer Engine",
            "--lr-path needs --save",
            "--lr-path branch needs --lr-path-parent",
            "--lr-path needs --lr",
        ],
    ),
    "bad values": (
        ["--lr-path", "main", "--train-iters", "x", "--lr-path-style", "cosin", "--no-save-optim"],
        [
            "argument --train-iters: invalid int value: 'x'",
            "argument --lr-path-style: invalid choice: 'cosin'",
            "--no-save-optim cannot be given with --lr-path",
        ],
    ),
    "neither": (
        ["--lr-path-style", "knee", "--log-intervall", "4", "--run", "main"],
        [
            "unrecognized arguments: --log-intervall 4",
            "--lr-path-style has no effect without --lr-path",
            "--run main names a run of a plan",
        ],
    ),
    "a path that there is not": (
        ["--lr-path", "sideways", "--lr-path-style", "knee", "--train-iters", "x"],
        ["argument --lr-path: invalid choice", "argument --train-iters: invalid int value"],
    ),
}
A_PLAN = {
    "a sound run": (
        ["--run", "main", "--seed", "9", "--no-save-optim", "--optimizer", "muon", "--fp16"],
        ["--seed 9 contradicts", "--no-save-optim cannot be given with a plan", "--optimizer muon"],
    ),
    "no such run": (
        ["--run", "branch-v9", "--no-save-optim", "--log-intervall", "4"],
        ["unrecognized arguments: --log-intervall 4", "ours has no run", "--no-save-optim cannot be given"],
    ),
    "no run": (["--no-save-optim"], ["--plan ", "--no-save-optim cannot be given with a plan"]),
}


@pytest.mark.parametrize("name", [*TOGETHER, *A_PLAN])
def test_all_refusals_come_in_one_message(name: str, folder: Path, argv: list[str]) -> None:
    extra, begins = (TOGETHER | A_PLAN)[name]
    plan = ["--plan", str(folder / "plan.yaml"), "--paradigm", "ours", "--device", "cpu"]
    outcome = train([*(plan if name in A_PLAN else argv), *extra])
    assert outcome.status == [2], outcome.output[-3000:]
    message = outcome.output.partition("lrpath: error: ")[2].strip().splitlines()
    assert message[0] == f"{len(begins)} problems:"
    assert len(message) == len(begins) + 1
    for line, begin in zip(message[1:], begins, strict=True):
        assert line.startswith(f"- {begin}")


def test_all_that_megatron_refuses_comes_in_one_message(argv: list[str], tmp_path: Path) -> None:
    """This includes this project's checks and Megatron's checks without a message (only a stack trace)."""
    path = ["--lr-path", "main", "--train-iters", "4", "--save", str(tmp_path / "own"), *RATES]
    wrong = [
        "--num-attention-heads",
        "5",
        "--recompute-granularity",
        "selective",
        "--recompute-method",
        "uniform",
    ]
    message = refusal([*argv, *path, *wrong, "--no-save-optim"])
    assert "--no-save-optim cannot be given with --lr-path" in message
    begin = "- Megatron refuses these arguments: "
    assert (
        f"{begin}assert args.hidden_size % args.num_attention_heads == 0 does not hold (validate_args in"
        in message
    )
    assert message.count(begin) == 2
    alone = refusal([*argv, *path, *wrong])
    assert alone.startswith("2 problems:")
    assert alone.count(begin) == 2


def test_the_maximal_rate_and_a_place_to_save_are_needed(argv: list[str], tmp_path: Path) -> None:
    path = ["--lr-path", "main", "--train-iters", "4"]
    assert "--lr-path needs --lr" in refusal([*argv, *path, "--save", str(tmp_path / "own")])
    assert "--lr-path needs --save" in refusal([*argv, *RATES, *path])


def test_a_plan_needs_a_paradigm_and_a_run_that_exists(folder: Path) -> None:
    plan = folder / "plan.yaml"
    message = refusal(["--plan", str(plan), "--device", "cpu"])
    assert "--paradigm and --run must be given too; `lrpath plan` lists the runs" in message
    assert "has no run 'branch-v7'" in refusal(run_words(plan, "ours", "branch-v7"))
    assert str(folder / "nowhere.yaml") in refusal(run_words(folder / "nowhere.yaml", "ours", "main"))


def test_help_shows_the_group_and_megatrons_arguments() -> None:
    outcome = train(["--help"]).ok()
    group = outcome.output.partition("learning-rate path switching:")[2]
    for option in ("--plan", "--paradigm", "--run", "--device", "--lr-path ", "--lr-path-parent-step"):
        assert option in group
    assert "--tensor-model-parallel-size" in outcome.output


def test_without_plan_and_path_it_is_plain_megatron(argv: list[str], tmp_path: Path) -> None:
    """Scheduler, saving and resuming are Megatron's, and no file of this project is next to checkpoints."""
    own = ["--save", str(tmp_path / "own"), "--load", str(tmp_path / "own")]
    plain = ["--train-iters", "8", "--lr-decay-style", "linear", "--lr-warmup-iters", "2", *RATES, *own]
    first = used([*argv, *plain, "--exit-interval", "5"])
    rates = first + used([*argv, *plain])
    assert len(first) == 5
    assert rates == pytest.approx([0.0, 0.005, *(0.01 - 0.009 * step / 6 for step in range(6))])
    assert complete_steps(tmp_path / "own") == [5, 8]
    assert not list(tmp_path.rglob("lineage.json"))
    assert not list(tmp_path.rglob("history.jsonl"))


def test_the_plans_words_are_megatrons_arguments(folder: Path) -> None:
    """The parser has every argument that a plan sets."""
    from megatron_lrpath.training.options.arguments import explicit_arguments
    from megatron_lrpath.training.options.from_plan import plan_flags

    plan = load_plan(folder / "plan.yaml")
    said = explicit_arguments(
        [word for part in plan_flags(plan, plan.run("ours", "main")).values() for word in part]
    )
    assert (said["train_iters"], said["lr"], said["global_batch_size"]) == (6, 0.01, 4)


def test_arguments_without_effect_are_refused_before_the_model_is_built(
    folder: Path, argv: list[str]
) -> None:
    path = ["--lr-path", "main", "--train-iters", "8", "--save", str(folder / "idle")]
    said = refusal([*argv, *RATES, *path, "--lion-beta1", "0.9", "--moe-router-topk", "2"])
    assert "--lion-beta1 has no effect without --optimizer lion" in said
    assert (
        "--moe-router-topk has no effect without --num-experts; leave it out, or give what it needs" in said
    )
    assert not (folder / "idle").exists()


def test_a_model_that_megatron_does_not_build_is_refused_in_its_words(folder: Path, argv: list[str]) -> None:
    path = ["--lr-path", "main", "--train-iters", "8", "--save", str(folder / "unbuilt")]
    said = refusal([*argv, *RATES, *path, "--num-experts", "4", "--moe-router-topk", "1"])
    assert "Megatron refuses these arguments: Please use --moe-router-pre-softmax when topk is 1." in said
    assert "Traceback" not in said
