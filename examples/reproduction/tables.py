#!/usr/bin/env python3
"""Turn `results/` into the tables of docs/reproduction.md and docs/advise.md, in place, and its figure.

A table is between `<!-- measured: NAME -->` and `<!-- end -->`; nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from beyond import cheaper, draw_figure, shapes
from certainty import difference_said
from costs import draw_costs, table
from drift import PERIODS, TEXTS, against_ptfs, period_lines
from findings import LATER, at_rates, finding_rows, one
from forest import draw_claims
from main_setting import all_findings, parts_said
from measured import RESULTS, Measured, Row, nats, percent, said
from regret import MEAN_ALPHAS, in_perplexity
from regret import lines as regret_lines

from megatron_lrpath.experiment.load import is_experiment, load_experiment
from megatron_lrpath.experiment.run import experiment_tasks

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL = Path(__file__).resolve().parents[1] / "paper" / "small"
DOCUMENTS = ("reproduction.md", "advise.md")
NAMES = {"ptfs": "PTFS", "cpt": "CPT", "ours": "Ours"}
"""Names of the paradigms in the tables, in order."""
PTFS_STYLES = ("cosine", "knee", "multi-step", "minus-sqrt", "linear")
BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def natural(name: str) -> tuple[str | float, ...]:
    """Return a key that sorts numbers within names by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return tuple(float(part) if index % 2 else part for index, part in enumerate(parts))


def label(name: str, row: Row) -> str:
    """Return the paradigm; for PTFS with the schedule in the variation's name, or "ours' rates"."""
    if row.paradigm != "ptfs":
        return NAMES[row.paradigm]
    if "at-ours-rates" in name:
        return "PTFS (ours' rates)"
    style = next((style for style in PTFS_STYLES if row.variation.startswith(style)), "cosine")
    return f"PTFS ({style})"


def perplexities(name: str) -> str:
    """Return an experiment's table: variations and paradigms, mean ± deviation over seeds, mean loss."""
    measured = Measured.load(name)
    if not measured.rows:
        return "Not measured yet.\n"
    versions = sorted({row.version for row in measured.rows})
    paper = yaml.safe_load((SMALL / f"{name}.yaml").read_text(encoding="utf-8")).get("paper", {})
    groups = {(natural(row.variation), list(NAMES).index(row.paradigm)): row for row in measured.rows}
    lines = []
    for _, row in sorted(groups.items()):
        found = [measured.at(row.variation, row.paradigm, version) for version in versions]
        counts = sorted({len(values) for values in found if values})
        line = [row.variation, label(name, row), f"{row.cost:.2f}", *(said([*one.values()]) for one in found)]
        line += [mean_loss(found), "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))]
        numbers = paper.get(row.variation, {}).get(row.paradigm, ())
        lines.append([*line, " ".join(f"{value:.2f}" for value in numbers)] if paper else line)
    header = ["variation", "paradigm", "cost", *versions, "mean, nats", "seeds"]
    return markdown([*header, f"the paper: {' '.join(versions)}"] if paper else header, lines)


def mean_loss(found: Sequence[Mapping[int, float]]) -> str:
    """Return the mean loss in nats a token over the versions, of the seeds that have all of them."""
    seeds = set.intersection(*(set(values) for values in found))
    losses = [statistics.fmean(math.log(values[seed]) for values in found) for seed in sorted(seeds)]
    return said(losses, 4) if losses else "–"


def effort() -> str:
    """Return the table of the trainings and steps of each experiment without those it shares with others."""
    lines = []
    for path in sorted(SMALL.glob("*.yaml"), key=lambda path: natural(path.stem)):
        if is_experiment(path):
            tasks = experiment_tasks(load_experiment(path))
            steps = sum(task.run.steps for task in tasks)
            lines.append([f"`{path.name}`", str(len(tasks)), f"{steps:,}"])
    return markdown(["file", "trainings", "steps"], lines)


def finding_table(main: bool) -> str:
    """Return the main findings or the details with their verdicts; a list is corrected for its own number."""
    header = ["claim", "measured here", "mean [95% interval]", "nats", "seeds", "here"]
    return markdown(header, finding_rows([finding for finding in all_findings() if finding.main == main]))


def periods() -> str:
    """Return the table of the perplexity of the novels' models by period of the validation text."""
    lines = period_lines()
    header = ["model of", "model", *(f"text of {name}" for name in PERIODS)]
    return markdown(header, lines) if lines else "Not measured yet.\n"


def kinds_of_text() -> str:
    """Return the table of the novels' models against PTFS on all, old and new text."""
    return markdown(["model", "cost", *TEXTS, "seeds"], against_ptfs())


def merged() -> str:
    """Return the table of branches previewed by merging, against the trained ones."""
    path = RESULTS / "merged.json"
    if not path.exists():
        return "Not measured yet.\n"
    rows = json.loads(path.read_text())
    lines = []
    for key in dict.fromkeys((row["decay"], row["alpha"], row["version"]) for row in rows):
        mine = [row for row in rows if (row["decay"], row["alpha"], row["version"]) == key]
        gaps = [row["merged"] / row["trained"] - 1 for row in mine if row["trained"]]
        values = [[row[name] for row in mine if row[name]] for name in ("undecayed", "merged", "trained")]
        gains = [
            math.log(row["undecayed"] / row["merged"]) / math.log(row["undecayed"] / row["trained"])
            for row in mine
            if row["trained"]
        ]
        share = f"{100 * statistics.fmean(gains):.0f}%" if gains else "–"
        lines.append(
            [
                key[0],
                str(key[1]),
                key[2],
                *map(said, values),
                percent(gaps),
                nats(gaps),
                share,
                str(len(mine)),
            ]
        )
    header = [
        "decay",
        "α",
        "version",
        "main path",
        "merged",
        "trained branch",
        "merged / trained − 1",
        "nats",
        "share of the decay's gain",
        "seeds",
    ]
    return markdown(header, lines)


def held_out(by: str) -> str:
    """Return the table of the predictions of `lrpath advise` for branches that were not fitted.

    `by` is `version` (for every fit), `choice` (alpha and decay, of the fits that saw the main path evaluated), both
    over all seeds, or `seed`.
    """
    path = RESULTS / "advise.json"
    if not path.exists():
        return "Not measured yet.\n"
    fits = in_perplexity(json.loads(path.read_text())["fits"])
    lines = []
    for key in dict.fromkeys((fit["corpus"], fit["fit"]) for fit in fits):
        mine = [fit for fit in fits if (fit["corpus"], fit["fit"]) == key]
        groups = groups_of(mine, by)
        if by != "choice" or key[1].endswith("evaluated"):
            lines += [[*key, str(len(mine)), name, *errors_said(checks)] for name, checks in groups.items()]
    errors = ["mean", "mean size", "worst", "in the interval"]
    gaps = ["gap to the plan's branch: mean size", "worst", "in the interval"]
    return markdown(["corpus", "fitted to", "seeds", "of", "branches", *errors, *gaps], lines)


def regret_table() -> str:
    """Return the table of the regret of the advice's predictions, by fit and seed."""
    if not (RESULTS / "advise.json").exists():
        return "Not measured yet.\n"
    return markdown(
        ["fitted to", "of", "branches of v2, v4", *(f"mean α up to {one:g}" for one in MEAN_ALPHAS)],
        regret_lines(),
    )


def groups_of(fits: Sequence[dict[str, Any]], by: str) -> dict[str, list[dict[str, Any]]]:
    """Return the branches that the fits have predicted, in groups; see `held_out`."""
    if by == "seed":
        return {f"seed {fit['seed']}": fit["checks"] for fit in fits}
    every = [check for fit in fits for check in fit["checks"]]
    return (
        grouped(every, ("alpha", "decay"))
        if by == "choice"
        else {"all": every} | grouped(every, ("version",))
    )


def grouped(checks: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the branches grouped by each of `names` (alpha, decay or version), by its value."""
    groups = {}
    for name in names:
        for value in sorted({check[name] for check in checks}):
            said_so = f"α={value:g}" if name == "alpha" else str(value)
            groups[said_so] = [check for check in checks if check[name] == value]
    return groups


def errors_said(checks: Sequence[dict[str, Any]]) -> list[str]:
    """Return number, mean, mean size, largest size and share within the interval of errors, then of gaps."""
    errors = [one["error"] for one in checks]
    gaps = [one for one in checks if "gap_error" in one]
    return [
        str(len(errors)),
        f"{100 * statistics.fmean(errors):+.2f}%",
        *sizes_said(errors),
        share_said([one["inside"] for one in checks]),
        *sizes_said([one["gap_error"] for one in gaps]),
        share_said([one["gap_inside"] for one in gaps]),
    ]


def share_said(inside: Sequence[bool]) -> str:
    """Return the share of true values in percent."""
    return f"{100 * statistics.fmean(inside):.0f}%" if inside else "–"


def sizes_said(errors: Sequence[float]) -> list[str]:
    """Return the mean size and the largest size in percent."""
    sizes = [abs(error) for error in errors]
    return [f"{100 * statistics.fmean(sizes):.2f}%", f"{100 * max(sizes):.2f}%"] if sizes else ["–", "–"]


def published(part: str, first: str, form: Callable[[float], str]) -> str:
    """Return a part of the results of `published.py` as a table, its rows' names in the column `first`."""
    path = RESULTS / "published.json"
    if not path.exists():
        return "Not measured yet.\n"
    rows = json.loads(path.read_text())[part]
    lines = [[name, *map(form, row.values())] for name, row in rows.items()]
    return markdown([first, *next(iter(rows.values()))], lines)


def machines() -> str:
    """Return a list of the machines and versions that the experiments were measured on."""
    experiments: dict[str, list[str]] = {}
    for name, measured_on in json.loads((RESULTS / "machines.json").read_text()).items():
        for facts in measured_on:
            packages = ", ".join(f"{package} {number}" for package, number in facts["packages"].items())
            said_so = f"{facts['date']}, {facts['processor']}, Python {facts['python']}, {packages}"
            said_so += f", commit {facts['commit']}"
            experiments.setdefault(said_so, []).append(name)
    return "".join(f"- {said_so}: {', '.join(names)}\n" for said_so, names in experiments.items())


def progress(prefix: str) -> str:
    """Return the table of the measured perplexities of a setting's experiments, by seed."""
    lines = []
    for path in sorted(SMALL.glob(f"{prefix}-*.yaml"), key=lambda path: natural(path.stem)):
        if is_experiment(path):
            experiment = load_experiment(path)
            of_each = len(experiment.groups) * len(experiment.paradigms) * len(experiment.show)
            there = Counter(row.seed for row in Measured.load(path.stem).rows)
            done = ", ".join(f"{seed}: {count} of {of_each}" for seed, count in sorted(there.items()))
            seeds = " ".join(map(str, dict.fromkeys(point.plan.seed for point in experiment.points)))
            lines.append([f"`{path.name}`", seeds, done or "none"])
    return markdown(["file", "its seeds", "perplexities measured, by seed"], lines)


def rates() -> str:
    """Return the rows of Table 8: how far apart the paradigms are at each maximal rate."""
    measured = at_rates()
    lines = []
    for variation in dict.fromkeys(row.variation for row in measured.rows):
        for over, under in (("ptfs", "ours"), ("cpt", "ours"), ("cpt", "ptfs")):
            found = [
                measured.difference(one(variation, over, v), one(variation, under, v), paired=False)
                for v in LATER
            ]
            rate = variation.removeprefix("max_lr")
            ratio = f"{NAMES[over]} / {NAMES[under]} − 1"
            lines.append([rate, ratio, *map(difference_said, found), str(found[-1].seeds)])
    return markdown(["η_max", "perplexities of", *LATER, "seeds"], lines)


MAKERS: dict[str, Callable[[], str]] = {
    "claims": partial(finding_table, main=True), "findings": partial(finding_table, main=False),
    "periods": periods, "drift": kinds_of_text, "merged": merged, "machines": machines,
    "held-out": partial(held_out, by="version"), "held-out-by": partial(held_out, by="choice"),
    "held-out-seeds": partial(held_out, by="seed"), "regret": regret_table,
    "parts": parts_said, "progress": partial(progress, prefix="r20"),
    "costs": lambda: markdown(table()[0], table()[1:]), "rates": rates, "effort": effort, "shapes": shapes, 
    "cheaper": cheaper,
    "published-parameters": lambda: published("parameters", "model", "{:.3f}".format),
    "published-errors": lambda: published("errors", "curve", "{:+.2%}".format),
}  # fmt: skip


def main() -> None:
    """Rewrite the tables and figures of the documents."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name in DOCUMENTS:
        path = DOCS / name

        def fresh(match: re.Match[str]) -> str:
            maker = MAKERS.get(match[2], lambda: perplexities(match[2]))
            return f"{match[1]}{maker()}{match[3]}"

        path.write_text(BLOCK.sub(fresh, path.read_text(encoding="utf-8")), encoding="utf-8")
    draw_figure(DOCS / "reproduction-beyond.svg")
    draw_costs(DOCS / "reproduction-costs.svg")
    draw_claims(DOCS / "reproduction-claims.svg")


if __name__ == "__main__":
    main()
