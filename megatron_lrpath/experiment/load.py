"""Load an experiment file: its plans, checked like plan files, and the trainings that they share."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.plan import PARADIGMS, Plan, Run, run_identity
from megatron_lrpath.plan.file.keys import NAME, REQUIRED, SEED, TEXT, Key
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.overrides import change
from megatron_lrpath.plan.file.source import Entry, Source, parse_source, plain, plan_text, read_source
from megatron_lrpath.plan.file.values import read_key, read_list, read_mapping, read_section, read_value

PLANS = "plans"  # the folder of the written plans, in the experiment's output


@dataclass(frozen=True)
class Point:
    """One variation with one seed, as a plan.

    `group` is the variation without its seed, `text` the plan file, `values` the varied values by key.
    """

    name: str
    group: str
    values: dict[str, Any]
    plan: Plan
    text: str


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file.

    `paradigms` are the paradigms to run; `only` the runs to train with their ancestors (empty: all);
    `show` the versions in the table. `paper` has the paper's perplexities by group and paradigm, in the
    order of `show`.
    """

    path: Path
    name: str
    about: str
    output: Path
    paradigms: tuple[str, ...]
    only: tuple[str, ...]
    show: tuple[str, ...]
    points: tuple[Point, ...]
    paper: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """Return the variations without duplicates, in order."""
        return list(dict.fromkeys(point.group for point in self.points))

    def of(self, group: str) -> list[Point]:
        """Return the points of a variation, one for each seed."""
        return [point for point in self.points if point.group == group]


_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")


def variations(
    points: Sequence[Mapping[str, Any]], vary: Mapping[str, Sequence[Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """Return every point with every combination of the varied values, each with its name."""
    made = []
    for point in points or [{}]:
        given = dict(point)
        name = given.pop("name", None)
        for values in itertools.product(*vary.values()):
            varied = dict(zip(vary, values, strict=True))
            parts = [str(name)] if name is not None else [_name_part(*item) for item in given.items()]
            parts += [_name_part(*item) for item in varied.items()]
            made.append(("_".join(parts) or "plan", given | varied))
    return made


def _name_part(key: str, value: Any) -> str:
    """Return a value as part of a folder's name: text unchanged, numbers with the last part of their key."""
    text = str(value).rsplit("/", 1)[-1].removesuffix(".yaml") if key == "plan" else str(value)
    text = _UNSAFE.sub("-", text).strip("-.")
    is_word = isinstance(value, str) and value != "inf" and not value[:1].isdigit()
    return text if is_word or key in ("plan", "model") else key.rsplit(".", 1)[-1] + text


def training_key(plan: Plan, run: Run) -> str:
    """Return a key that is equal for two runs if and only if they are the same training: identity and data.

    The end of a main path does not count, because a main path can always be extended.
    """
    facts = run_identity(plan, run) | {"slices": plan.data.slices}
    if run.mix is not None:
        facts["mix_slices"] = [part.slice for part in run.mix.parts]
    if not run.makes_version:
        facts["versions"] = [
            (version.name, version.steps)
            + ((version.max_lr, plan.timeline.rate_steps(version)) if version.max_lr is not None else ())
            + ((version.replay.to_dict(),) if version.replay else ())
            for version in plan.versions
        ]
    return json.dumps(facts, sort_keys=True)


KEYS = (
    Key("name", NAME, REQUIRED, "name of the experiment"),
    Key("about", TEXT, "", "what it shows, the table's caption"),
    Key("plan", TEXT, REQUIRED, "the plan file that is varied, relative to the experiment file's folder"),
    Key("set", {"type": "object"}, None, "changes to the plan for all variations, by dotted keys"),
    Key(
        "points", {"type": "array"}, None, "variations one by one: mappings of dotted keys, `name` their name"
    ),
    Key(
        "vary", {"type": "object"}, None, "lists of values by dotted key; every combination, with every point"
    ),
    Key("seeds", {"type": "array"}, None, "seeds that every variation is trained with; default: the plan's"),
    Key("paradigms", {"type": "array"}, None, "ours, ptfs, cpt; default: all"),
    Key("runs", {"type": "array"}, None, "only these runs and those they start from; default: all"),
    Key("show", {"type": "array"}, None, "versions in the table; default: all but the first"),
    Key("paper", {"type": "object"}, None, "the paper's perplexities: variation, paradigm, numbers"),
    Key("output", TEXT, None, "folder of all variations; default: `runs/NAME`"),
)
MOST = 500
"""Maximum number of variations times seeds in an experiment."""


def is_experiment(path: Path) -> bool:
    """Return whether the file names a plan to vary (a plan file does not)."""
    return read_source(path).is_experiment


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file and all its plans.

    Raise PlanError: the problem in the experiment file, or the variation and the problem in its plan.
    """
    source = read_source(path)
    top = read_section(source.root, KEYS)
    texts = {key.name: read_key(top, key) for key in KEYS if key.schema in (NAME, TEXT)}
    output = Path(texts["output"] or f"runs/{texts['name']}")
    points = _points(source, top, texts, output)
    versions = [version.name for version in points[0].plan.versions]
    experiment = Experiment(
        path=path,
        name=texts["name"],
        about=texts["about"],
        output=output,
        paradigms=_names(top.get("paradigms"), PARADIGMS) or PARADIGMS,
        only=_names(top.get("runs"), None),
        show=_names(top.get("show"), versions) or tuple(versions[1:] or versions),
        points=points,
    )
    return replace(experiment, paper=_paper(top.get("paper"), experiment))


def load_together(paths: Sequence[Path]) -> list[Experiment]:
    """Read several experiment files whose plans share trainings: one main path serves the branches of all.

    Raise PlanError as `load_experiment`.
    """
    experiments = [load_experiment(path) for path in paths]
    points = iter(_sharing_main_paths([point for one in experiments for point in one.points]))
    return [replace(one, points=tuple(islice(points, len(one.points)))) for one in experiments]


OWN = {"name", "output"}  # keys of every variation's plan that follow from the experiment's


def _cases(source: Source, top: Mapping[str, Entry]) -> list[tuple[str, dict[str, Any], int | None]]:
    """Return the variations with every seed: name without the seed, varied values, seed."""
    listed = plain(top["points"]) if "points" in top else []
    vary = plain(top["vary"]) if "vary" in top else {}
    for key, kind, value in (("points", list, listed), ("vary", dict, vary)):
        if not isinstance(value, kind):
            raise top[key].error("must be a " + ("list of mappings" if kind is list else "mapping"))
    for name, values in vary.items():
        if not isinstance(values, list) or not values:
            raise source.find(f"vary.{name}", "vary").error("must be a list of values")
    if not all(isinstance(point, dict) for point in listed):
        raise top["points"].error("must be a list of mappings, like `- {model: 203m}`")
    seeds: list[int | None] = [None]
    if "seeds" in top:
        seeds = [read_value(item, SEED) for item in read_list(top["seeds"])]
    if not seeds:
        raise top["seeds"].error("give at least one seed, or leave the key out: then it is the plan's own")
    cases = [(*case, seed) for case in variations(listed, vary) for seed in seeds]
    if len(cases) > MOST:
        raise source.root.error(f"{len(cases)} variations are more than the {MOST} that there may be")
    return cases


def _points(
    source: Source, top: Mapping[str, Entry], texts: Mapping[str, str], output: Path
) -> tuple[Point, ...]:
    cases = _cases(source, top)
    fixed = plain(top["set"]) if "set" in top and read_mapping(top["set"]) else {}
    read = functools.cache(lambda path: plain(read_source(path).root))  # each plan file once

    def point(group: str, values: dict[str, Any], seed: int | None) -> Point:
        name = group if seed is None else f"{group}_seed{seed}"
        mapping = copy.deepcopy(read(source.path.parent / str(values.get("plan", texts["plan"]))))
        changes = {**fixed, **values, **({} if seed is None else {"seed": seed})}
        taken = OWN if seed is None else OWN | {"seed"}
        for key in sorted(taken & {*fixed, *values}):
            own = "seeds" if key == "seed" else key
            raise source.find(f"set.{key}", f"vary.{key}", "points").error(
                f"the experiment's `{own}` gives every variation its {key}; leave one of them out"
            )
        try:
            for key, value in changes.items():
                if key != "plan":
                    change(mapping, key, value)
        except ValueError as error:
            raise PlanError(f"{source.path}: {group}: {error}") from None
        mapping |= {"name": f"{texts['name']}-{name}"[:100], "output": str(output / name)}
        return _point(source.path, output, name, group, values, mapping)

    made = [point(*case) for case in cases]
    names = [one.name for one in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise source.root.error(f"two variations are called {twice!r}; give points a `name`")
    return _sharing_main_paths(made)


def is_written_by_experiment(plan: Plan) -> bool:
    """Return whether an experiment has written the plan's file: other plans can then share its runs and jobs."""
    output = Path(plan.output).resolve()
    return Path(plan.path).resolve() == output.parent / PLANS / f"{output.name}.yaml"


def _point(
    origin: Path, output: Path, name: str, group: str, values: dict[str, Any], mapping: dict[str, Any]
) -> Point:
    """Return the point with the plan `mapping`, checked; its plan file is under the experiment's `output`."""
    text = plan_text(mapping)
    try:
        plan = plan_from(parse_source(output / PLANS / f"{name}.yaml", text))
    except UserError as error:
        raise PlanError(f"{origin}: the variation {name}: {error}") from None
    return Point(name, group, values, plan, text)


def _sharing_main_paths(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points, with main paths that serve each other's branches if they are the same training."""
    keys = [training_key(point.plan, point.plan.main) for point in points]
    left: dict[str, set[int]] = {}  # by main path, the steps at which branches of any plan leave it
    for point, key in zip(points, keys, strict=True):
        left.setdefault(key, set()).update(point.plan.main.keep_steps)
    made = []
    for point, key in zip(points, keys, strict=True):
        extra = left[key] - set(point.plan.main.keep_steps)
        if not extra:
            made.append(point)
            continue
        mapping = yaml.safe_load(point.text)
        mapping["also_branch_at"] = sorted({*mapping.get("also_branch_at", ()), *extra})
        output = Path(point.plan.path).parent.parent
        made.append(_point(point.plan.path, output, point.name, point.group, point.values, mapping))
    return tuple(made)


def _names(entry: Entry | None, known: Sequence[str] | None) -> tuple[str, ...]:
    items = read_list(entry) if entry else []
    for item in items:
        if known is not None and str(item.value) not in known:
            raise item.error(f"{str(item.value)!r} is none of {', '.join(known)}")
    return tuple(str(item.value) for item in items)


def _paper(entry: Entry | None, experiment: Experiment) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return the paper's numbers; each row has one for every version in the table."""
    if entry is None:
        return {}
    paper: dict[str, dict[str, tuple[float, ...]]] = {}
    for group, rows in read_mapping(entry).items():
        if group not in experiment.groups:
            raise rows.error(f"there is no such variation; there are {', '.join(experiment.groups)}")
        for paradigm, numbers in read_mapping(rows).items():
            values = plain(numbers)
            if paradigm not in experiment.paradigms:
                raise numbers.error(f"the experiment has no paradigm {paradigm!r}")
            if not isinstance(values, list) or len(values) != len(experiment.show):
                raise numbers.error(f"give {len(experiment.show)} numbers, for {experiment.show}")
            if not all(type(value) in (int, float) for value in values):
                raise numbers.error("must be a list of numbers, the paper's perplexities")
            paper.setdefault(group, {})[paradigm] = tuple(map(float, values))
    return paper
