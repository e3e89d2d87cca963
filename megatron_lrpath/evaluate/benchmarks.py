"""The downstream benchmarks by name: the nine of the paper's Tables 4 and 11, and any task of the harness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    Attributes:
        label: its heading.
        task: the task or group of lm-evaluation-harness (or of `evaluate/tasks`) that measures it.
        metric: which of the task's metrics counts, as `metric,filter`; empty for the task's first one.
    """

    label: str
    task: str
    metric: str = ""


PAPER: tuple[Benchmark, ...] = (
    Benchmark("C3", "lrpath_c3", "acc_norm,none"),
    Benchmark("GSM8K", "gsm8k", "exact_match,flexible-extract"),
    Benchmark("MMLU", "mmlu", "acc,none"),
    Benchmark("CSL", "lrpath_csl", "acc_norm,none"),
    Benchmark("C-EVAL", "ceval-valid", "acc,none"),
    Benchmark("BBH", "bbh_fewshot", "exact_match,none"),
    Benchmark("CMMLU", "cmmlu", "acc,none"),
    Benchmark("GAOKAO", "lrpath_gaokao", "acc,none"),
    Benchmark("AGIEval", "agieval", "acc,none"),
)
GROUPS = {"paper": PAPER}


def benchmarks(words: Iterable[str]) -> list[Benchmark]:
    """The benchmarks that `words` name, each once: `paper`, a heading of it in any case, or a task's own name."""
    headings = {one.label.casefold(): one for one in PAPER}
    by_task = {one.task: one for one in PAPER}
    found: list[Benchmark] = []
    for word in words:
        one = headings.get(word.casefold()) or by_task.get(word) or Benchmark(word, word)
        found += [new for new in GROUPS.get(word.casefold(), (one,)) if new not in found]
    return found


def in_order(tasks: Iterable[str]) -> list[Benchmark]:
    """The benchmarks of these tasks: the paper's in the paper's order, then the others by name."""
    named = benchmarks(sorted(tasks))
    return sorted(named, key=lambda one: (PAPER.index(one) if one in PAPER else len(PAPER), one.label))
