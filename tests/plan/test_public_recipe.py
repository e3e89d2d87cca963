"""The recipe on public data: its plan is valid, and all its commands parse."""

from __future__ import annotations

import os
import shlex
import subprocess

from megatron_lrpath.cli import build_parser
from megatron_lrpath.plan import load_plan
from tests.support import ROOT
from tools import check_slices, preprocess_data, slice_versions, train_tokenizer

RECIPE = ROOT / "examples/public/203m"
STEPS = ("download", "tokenizer", "tokenize", "draw", "plan", "run", "report")


def test_the_commands_of_the_recipe_parse_and_fit_its_plan() -> None:
    environment = {**os.environ, "DRY": "1", "WORKERS": "4"}
    answer = subprocess.run(
        ["bash", str(RECIPE / "recipe.sh"), *STEPS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [shlex.split(line) for line in answer.stdout.splitlines()]
    plan = load_plan(RECIPE / "plan.yaml")
    tools = {
        one.__name__.removeprefix("tools."): one for one in (preprocess_data, slice_versions, train_tokenizer)
    }
    parsed: dict[str, list[object]] = {}
    for program, *argv in commands:
        if program == "hf":
            parsed.setdefault("hf", []).append(argv)
        elif program.endswith("lrpath"):
            parsed.setdefault(argv[0], []).append(build_parser().parse_args(argv))
        else:
            name = argv[0].removeprefix("tools/").removesuffix(".py")
            known = tools.get(name)
            assert known or name == check_slices.__name__.removeprefix("tools.")
            parsed.setdefault(name, []).append(known.build_parser().parse_args(argv[1:]) if known else argv)
    count = len(plan.versions)
    expected = {"hf": count, "train_tokenizer": 1, "preprocess_data": count, "slice_versions": count}
    assert {name: len(calls) for name, calls in parsed.items()} == expected | {
        "check_slices": 1,
        "plan": 1,
        "run": 1,
        "report": 1,
    }
    for version, args in zip(plan.versions, parsed["slice_versions"], strict=True):
        request = slice_versions.request_of(args, [])  # type: ignore[arg-type]
        [(name, tokens)] = request.versions
        assert name == version.name
        assert tokens is not None
        assert tokens >= version.steps * plan.batch.tokens
        assert request.drop_duplicates
    wrong = subprocess.run(
        ["bash", str(RECIPE / "recipe.sh"), "no"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "there are download tokenizer" in wrong.stderr
