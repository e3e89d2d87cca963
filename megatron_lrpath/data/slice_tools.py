"""Slices as tables and JSON, as printed by tools/slice_versions.py and tools/check_slices.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from megatron_lrpath.console import terminal_table
from megatron_lrpath.data.slice import Slice


def tokens_table(slices: Sequence[Slice], left: dict[str, int] | None = None) -> Table:
    """Return tokens and shares by domain (rows) and version (columns); `left` are tokens in no slice, by
    domain.
    """
    domains = list(dict.fromkeys(domain for one in slices for domain in one.tokens_by_domain))
    domains += [domain for domain in left or {} if domain not in domains]
    titles = ("domain", *(one.name for one in slices), *(["not drawn"] if left is not None else []))
    look = {"title": "tokens by domain and version", "title_justify": "left"}
    table = terminal_table(titles, "l" + "R" * (len(titles) - 1), **look)
    for domain in domains:
        cells = [_amount(one.tokens_by_domain.get(domain, 0), one.tokens) for one in slices]
        table.add_row(domain, *cells, *([_amount(left.get(domain, 0))] if left is not None else []))
    rest = [_amount(sum(left.values()))] if left is not None else []
    table.add_row("tokens", *[_amount(one.tokens) for one in slices], *rest)
    table.add_row("documents", *[_amount(one.documents) for one in slices])
    return table


def describe(one: Slice) -> dict[str, Any]:
    """Return a slice as JSON-serializable values."""
    return {
        "name": one.name,
        "path": None if one.path is None else str(one.path),
        "seed": one.seed,
        "fingerprint": one.fingerprint,
        "documents": one.documents,
        "tokens": one.tokens,
        "tokens_by_domain": one.tokens_by_domain,
        "sources": [source.described(source.prefix) for source in one.sources],
    }


def _amount(number: int, whole: int | None = None) -> str:
    """Format a count: `9,999,999`, `10.500B`; with `whole` also its share: `1,234 12.3%`."""
    text = f"{number:,}"
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= max(limit, 10**7):
            text = f"{number / limit:,.3f}{unit}"
            break
    return text if whole is None or not number else f"{text} {number / whole:6.1%}"
