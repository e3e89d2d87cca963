"""A version is appended to a plan's text: what was written stays, however it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_lrpath.plan.file.edit import with_version

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
def test_what_was_written_stays(form: str, newline: str) -> None:
    before, after = (HEAD + text for text in FORMS[form])
    made = with_version(Path("p.yaml"), before.replace("\n", newline), VERSION, ["s/valid", "s/valid-v2"])
    assert made == after.replace("\n", newline)


@pytest.mark.parametrize("name", ["2025", "1e3", "yes", "v5"])
def test_a_name_that_looks_like_something_else_is_quoted(name: str) -> None:
    text = HEAD + FORMS["flow items"][0]
    made = yaml.safe_load(with_version(Path("p.yaml"), text, {"name": name, "steps": 7}, []))
    assert made["versions"][-1] == {"name": name, "steps": 7}
