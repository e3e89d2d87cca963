"""The prose linter reads the same text as a reader, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import prose


@pytest.fixture(autouse=True, scope="module")
def config() -> prose.Config:
    """Return the configuration of the project, with its checks registered."""
    return prose.registered()


BAD = "who" + "ever"  # in two parts, since this file is checked as well
BAD_PAIR = ("goes", "on")
READ = {
    "page.md": [f"{BAD} reads", f"a [{BAD}](x.md)"],
    "module.py": [
        f'"""Do it for {BAD} asks."""',
        f"x = 1  # {BAD} it is",
        f'raise ValueError("{BAD} asks for this")',
        f'raise ValueError(f"{{x}} {BAD} asks for this {{x}}")',
    ],
}
UNREAD = {
    "page.md": [f"`{BAD}`", f"```\n{BAD}\n```", f"[it]({BAD}.md)", f"<{BAD}>"],
    "module.py": [f"{BAD} = 1", f'print("{BAD}")', f'x["{BAD}"]'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in READ for text in READ[name]])
def test_prose_is_read(name: str, text: str, tmp_path: Path, config: prose.Config) -> None:
    (tmp_path / name).write_text(f"\n{text}\n")
    found = list(prose.problems(tmp_path / name, name, config))
    assert len(found) == 1
    assert found[0].startswith(f"{name}:2: write ")


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in UNREAD for text in UNREAD[name]])
def test_code_is_not_read(name: str, text: str, tmp_path: Path, config: prose.Config) -> None:
    (tmp_path / name).write_text(f"\n{text}\n")
    assert list(prose.problems(tmp_path / name, name, config)) == []


def test_a_form_is_found_across_a_line_break(tmp_path: Path, config: prose.Config) -> None:
    (tmp_path / "page.md").write_text(f"{BAD_PAIR[0]}\n{BAD_PAIR[1]}.\n")
    (found,) = prose.problems(tmp_path / "page.md", "page.md", config)
    assert found.startswith("page.md:2: write continues")


@pytest.mark.parametrize(
    "text", ["So do not change it.", "It is another plan's output.", "Args:\n    said: the last output."]
)
def test_usual_english_is_no_preferred_form(text: str, tmp_path: Path, config: prose.Config) -> None:
    (tmp_path / "page.md").write_text(f"{text}\n")
    assert list(prose.problems(tmp_path / "page.md", "page.md", config)) == []


def test_rows_whose_text_the_code_has_are_left_out(tmp_path: Path, config: prose.Config) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"| `alpha` | number | 0.6 | the branch {' '.join(BAD_PAIR)} |\n")
    assert len(list(prose.problems(page, "docs/data.md", config))) == 1
    assert list(prose.problems(page, "docs/plan-file.md", config)) == []
