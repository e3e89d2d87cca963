"""The paradigms and kinds of runs are rows that every part reads; no other file contains their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megatron_lrpath
from megatron_lrpath.paradigms import (
    CONTINUAL,
    CPT_VARIANTS,
    CYCLE_KINDS,
    KINDS,
    LR_PATH_KINDS,
    PARADIGM_ROWS,
    PARADIGMS,
    SCRATCH,
    SFT,
    path_form,
)
from megatron_lrpath.plan import runs
from tests.support.plan_text import plan_with, versions

PACKAGE = Path(megatron_lrpath.__file__).parent


def test_the_orders_of_the_command_line_and_of_the_papers_tables() -> None:
    assert PARADIGMS == ("ours", "ptfs", "cpt")
    assert tuple(LR_PATH_KINDS) == ("main", "branch", "scratch", "continual")
    assert CYCLE_KINDS == ("branch", "scratch", "continual")
    assert tuple(CPT_VARIANTS) == ("reset-max", "rewarm-max", "keep-min", "autoregressive")


@pytest.mark.parametrize("variant", CPT_VARIANTS)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_runs_of_a_plan_match_their_rows(paradigm: str, variant: str, tmp_path: Path) -> None:
    plan = plan_with(tmp_path, versions=versions(3), cpt_variant=variant)
    made = plan.runs(paradigm)
    assert {run.kind for run in made} == {kind.name for kind in PARADIGM_ROWS[paradigm].kinds}
    for run in made:
        row = KINDS[run.kind]
        assert run.name == row.run_name(run.version)
        assert run.makes_version == row.makes_version
        first_of_chain = row == CONTINUAL and run.version_index == 1  # identical to the first from scratch
        assert (run.parent is not None) == (row.needs_parent and not first_of_chain)
        shape, warms_up = path_form(SCRATCH.name if first_of_chain else run.kind, variant)
        assert (run.path.shape, run.path.warmup) == (shape, plan.schedule.warmup if warms_up else 0)


def test_every_paradigm_has_the_function_that_makes_its_runs() -> None:
    assert tuple(runs._MAKERS) == PARADIGMS
    assert len({row.colour for row in PARADIGM_ROWS.values()}) == len(PARADIGM_ROWS)
    assert SFT.name not in LR_PATH_KINDS


def test_the_names_of_paradigms_are_in_one_file() -> None:
    """Only code is checked: texts for people and documents may name them."""
    literal = re.compile(rf"""["']({"|".join(PARADIGMS)})["']""")
    files = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if literal.search(path.read_text())
    }
    assert files == {"paradigms.py"}
