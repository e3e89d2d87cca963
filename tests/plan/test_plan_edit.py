"""A version is appended to a plan's text: the existing text stays, in any format."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_lrpath.plan.file.edit import with_alphas, with_version

HEAD = "name: a  # first\n"
VERSION = {"name": "v2", "steps": 7}
FORMS = {
    "flow items": (
        "data: {slices: s, valid: s/valid}  # here\nversions:  # oldest first\n"
        "  - {name: v1, steps: 5}  # old\n\n# end\n",
        "data: {slices: s, valid: [s/valid, s/valid-v2]}  # here\nversions:  # oldest first\n"
        "  - {name: v1, steps: 5}  # old\n  - {name: v2, steps: 7}\n\n# end\n",
    ),
    "block items": (
        "data:\n  slices: s  # there\nversions:\n- name: v1\n  steps: 5  # old\n# end\nalpha: 0.5\n",
        "data:\n  slices: s  # there\n  valid: [s/valid, s/valid-v2]\nversions:\n- name: v1\n  steps: 5  # old\n"
        "- name: v2\n  steps: 7\n# end\nalpha: 0.5\n",
    ),
    "one line": (
        "data: {slices: s, valid: [s/valid]}\nversions: [{name: v1, steps: 5}]",
        "data: {slices: s, valid: [s/valid, s/valid-v2]}\nversions: [{name: v1, steps: 5}, {name: v2, steps: 7}]",
    ),
    "a list of sets": (
        "versions:\n    - {name: v1, steps: 5}\ndata:\n  slices: s\n  valid:\n  - s/valid",
        "versions:\n    - {name: v1, steps: 5}\n    - {name: v2, steps: 7}\n"
        "data:\n  slices: s\n  valid:\n  - s/valid\n  - s/valid-v2\n",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rest_of_a_plan_file_is_unchanged(form: str, newline: str) -> None:
    before, after = (HEAD + text for text in FORMS[form])
    made = with_version(Path("p.yaml"), before.replace("\n", newline), VERSION, ["s/valid", "s/valid-v2"])
    assert made == after.replace("\n", newline)


@pytest.mark.parametrize("name", ["2025", "1e3", "yes", "v5"])
def test_a_name_that_looks_like_something_else_is_quoted(name: str) -> None:
    text = HEAD + FORMS["flow items"][0]
    made = yaml.safe_load(with_version(Path("p.yaml"), text, {"name": name, "steps": 7}, []))
    assert made["versions"][-1] == {"name": name, "steps": 7}


ALPHAS = {
    "flow items": (
        "versions:  # oldest first\n  - {name: v1, steps: 5}  # old\n  - {name: v2, alpha: 0.6, steps: 5}\n# end\n",
        "versions:  # oldest first\n  - {name: v1, steps: 5, alpha: 0.25}  # old\n"
        "  - {name: v2, alpha: 0.4, steps: 5}\n# end\n",
    ),
    "block items": (
        "versions:\n- name: v1\n  steps: 5  # old\n# end of v1\n- name: v2\n  alpha:  # none yet\n  steps: 5\n",
        "versions:\n- name: v1\n  steps: 5  # old\n  alpha: 0.25\n# end of v1\n- name: v2\n  alpha: 0.4  # none yet\n"
        "  steps: 5\n",
    ),
    "nested": (
        "versions:\n  - steps: 5\n    name: v1\n    cycle_steps:\n      branch: 9\n  - {name: v2, steps: 5,}",
        "versions:\n  - steps: 5\n    name: v1\n    cycle_steps:\n      branch: 9\n    alpha: 0.25\n"
        "  - {name: v2, steps: 5, alpha: 0.4,}",
    ),
    "one line": (
        "versions: [{name: v1, steps: 5}, {name: v2, steps: 5, alpha: 0.5}]",
        "versions: [{name: v1, steps: 5, alpha: 0.25}, {name: v2, steps: 5, alpha: 0.4}]",
    ),
}


@pytest.mark.parametrize("form", ALPHAS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_alphas_are_set_where_they_belong(form: str, newline: str) -> None:
    before, after = (HEAD + text for text in ALPHAS[form])
    made = with_alphas(Path("p.yaml"), before.replace("\n", newline), {"v1": 0.25, "v2": 0.4})
    assert made == after.replace("\n", newline)
