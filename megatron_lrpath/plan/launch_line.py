"""Parse a launch line of Megatron without Megatron: its arguments, and their treatment in a plan or by
--lr-path.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lrpath.plan.arguments import (
    IDENTITY,
    NEUTRAL,
    PLAN,
    REFUSED,
    SET,
    START,
    Argument,
    by_option,
    option_hint,
)

_VALUE = re.compile(r"-?[0-9.].*")  # a negative number is a value, not an option
_SCRIPT = re.compile(r"\.py$")
_NO_VALUE = re.compile(
    r"\.py$|^\w+=|^(torchrun|python3?|srun|bash|exec)$|\$\{?\w+(ARGS|OPTIONS)|\[@\]", re.IGNORECASE
)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Given:
    """An option of a launch line with its values; `argument` is None if the table lacks it."""

    option: str
    values: tuple[str, ...]
    argument: Argument | None

    @property
    def text(self) -> str:
        """The option and its values as in the line."""
        return " ".join((self.option, *self.values))

    @property
    def name(self) -> str:
        """The option as in a plan."""
        return self.option.removeprefix("--").replace("-", "_")

    def problem(self) -> str | None:
        """Return the problem with the value; None if the parser accepts it, and for a shell variable."""
        if self.argument is None or any("$" in value for value in self.values):
            return None
        form = self.argument.forms[self.name]
        if form.type == "flag":
            return form.problem(True if not self.values else " ".join(self.values))
        if not self.values:
            return None if form.nargs == "*" else form.problem(True)
        return form.problem(list(self.values) if form.nargs or len(self.values) > 1 else self.values[0])

    def class_for(self, way: str) -> str:
        """Return the class of the argument with this value; UNKNOWN if the table lacks it."""
        if self.argument is None:
            return UNKNOWN
        return REFUSED if self.argument.refuses(way, list(self.values)) else self.argument.class_for(way)

    def meaning(self, way: str) -> str:
        """Return its treatment, as an entry of a list."""
        argument = self.argument
        if argument is None:
            return f"Megatron has no such argument{option_hint(self.option)}; your script's own belong to the run"
        found = self.class_for(way)
        if found == REFUSED:
            return argument.why(way)
        if way == PLAN and argument.key:
            return f"`{argument.key}` of the plan"
        section = "model" if argument.reason == "the model" else "megatron"
        where = f"`{section}.{self.name}` of the plan; " if way == PLAN else ""
        texts = {
            NEUTRAL: f"{where}{argument.reason}; may change from start to start",
            IDENTITY: f"{where}belongs to the run: {argument.reason or 'samples and batches'}",
            SET: "stays: the path takes it up",
            START: "stays: selects the run to start",
        }
        return texts[found]


def read_words(words: Sequence[str]) -> list[Given]:
    """Return the options of a launch line after the script, if one is named (torchrun's are before it)."""
    scripts = [index for index, word in enumerate(words) if _SCRIPT.search(word)]
    return list(_options(words[scripts[0] + 1 :] if scripts else _behind_module(words)))


def read_script(text: str) -> list[Given]:
    """Return the options of Megatron in a launch script: in continued lines, in variables, in arrays.

    Options that the table lacks are ignored: they can belong to other commands.
    """
    given = (_cut(one) for one in _options(_words_of(text)) if one.argument is not None)
    return list({one.option: one for one in given}.values())


def line_problems(words: Sequence[str], way: str = PLAN) -> list[str]:
    """Return the problems of the arguments after the `--` of `lrpath run` and `submit`, a line each.

    Arguments that the table lacks can belong to a fork: they are left to Megatron's parser.
    """
    stray = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    problems = [f"{shlex.join(stray)}: belongs to no option; options begin with two dashes."] if stray else []
    for given in _options(words):
        found = given.class_for(way)
        if said := given.problem():
            problems.append(f"{given.option}: {said}.")
        elif found == REFUSED:
            problems.append(f"{given.text}: {given.meaning(way)}.")
        elif found == START and given.name != "lr_path_neutral":
            problems.append(f"{given.option}: the runs are started with it; leave it out.")
    return problems


def _cut(given: Given) -> Given:
    """Return the option without trailing words that belong to the next variable, command or script."""
    assert given.argument is not None
    form = given.argument.forms[given.name]
    count = 0 if form.type == "flag" else form.nargs or 1
    values = given.values[:count] if isinstance(count, int) else given.values
    own = itertools.takewhile(lambda value: not _NO_VALUE.search(value), values)
    return Given(given.option, tuple(own) if isinstance(count, str) else values, given.argument)


def _behind_module(words: Sequence[str]) -> Sequence[str]:
    """Return the words after `-m [--] MODULE`; all words without that option."""
    if "-m" not in words:
        return words
    rest = list(words[words.index("-m") + 1 :])
    return rest[2:] if rest[:1] == ["--"] else rest[1:]


def _options(words: Sequence[str]) -> Iterator[Given]:
    option, values = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--") or _VALUE.fullmatch(word):
            values.append(word)
            continue
        if option:
            yield Given(option, tuple(values), by_option().get(option[2:].replace("-", "_")))
        option, _, value = word.partition("=")
        option, values = ("" if option == "--" else option), ([value] if value else [])


def _words_of(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    words: list[str] = []
    for line in joined.splitlines():
        try:
            found = shlex.split(line, comments=True)
        except ValueError:  # a quotation over several lines
            found = line.replace('"', " ").replace("'", " ").split()
        words += [part for word in found for part in re.sub(r"[()]", " ", word).split()]
    return words
