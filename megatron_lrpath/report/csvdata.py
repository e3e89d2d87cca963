"""The report's numbers as CSV, with every digit they have."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from megatron_lrpath.report.collect import PARADIGMS, RunTree


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; None and NaN become empty fields, floats keep every digit."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if _absent(value) else value for value in row] for row in rows])
    return stream.getvalue()


def perplexity_csv(tree: RunTree) -> str:
    """Every evaluation: one row for the whole validation set (domain empty) and one for each domain."""
    rows: list[tuple[object, ...]] = []
    for paradigm in PARADIGMS:
        for version in tree.plan.versions:
            record = tree.model_of(paradigm, version.name)
            if record is None or record.evaluation is None:
                continue
            scores = {"": record.evaluation.score, **record.evaluation.domains}
            for domain, score in scores.items():
                values = (domain, score.perplexity, score.loss, score.tokens)
                rows.append((paradigm, version.name, record.label, *values))
    header = ("paradigm", "version", "run", "domain", "perplexity", "loss", "tokens")
    return csv_text(header, rows)


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
