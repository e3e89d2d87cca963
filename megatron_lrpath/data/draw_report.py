"""What was drawn, as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from megatron_lrpath.data.draw import ShortageError
from megatron_lrpath.data.slice import Slice


def tokens_table(slices: Sequence[Slice], left: dict[str, int] | None = None) -> Table:
    """Tokens by version and domain, with documents and totals; `left` are tokens in no slice, by domain."""
    domains = list(dict.fromkeys(domain for one in slices for domain in one.tokens_by_domain))
    domains += [domain for domain in left or {} if domain not in domains]
    table = Table(title="tokens by version and domain", title_justify="left")
    table.add_column("version")
    for domain in [*domains, "tokens", "documents"]:
        table.add_column(domain, justify="right")
    for one in slices:
        counts = one.tokens_by_domain
        row = [_share(counts.get(domain, 0), one.tokens) for domain in domains]
        table.add_row(one.name, *row, f"{one.tokens:,}", f"{one.documents:,}")
    if left is not None:
        row = [f"{left.get(domain, 0):,}" for domain in domains]
        table.add_section()
        table.add_row("not drawn", *row, f"{sum(left.values()):,}", "")
    return table


def shortage_table(error: ShortageError) -> Table:
    """What is asked of every source and what it has."""
    table = Table(title="too few tokens", title_justify="left")
    table.add_column("source", overflow="fold")
    table.add_column("domain")
    for heading in ("share", "documents free", "tokens free", "tokens asked", "missing"):
        table.add_column(heading, justify="right")
    for row in error.table:
        missing = max(row.asked - row.free_tokens, 0)
        table.add_row(
            str(row.prefix),
            row.domain,
            f"{row.share:.1%}",
            f"{row.free_documents:,}",
            f"{row.free_tokens:,}",
            f"{row.asked:,}",
            f"{missing:,}" if missing else "",
            style="bold" if missing else None,
        )
    return table


def describe(one: Slice) -> dict[str, Any]:
    """A slice as JSON-able values."""
    return {
        "name": one.name,
        "path": None if one.path is None else str(one.path),
        "seed": one.seed,
        "fingerprint": one.fingerprint,
        "documents": one.documents,
        "tokens": one.tokens,
        "tokens_by_domain": one.tokens_by_domain,
        "sources": [
            {
                "prefix": str(source.prefix),
                "domain": source.domain,
                "fingerprint": source.fingerprint,
                "documents": len(source.documents),
                "tokens": source.tokens,
            }
            for source in one.sources
        ],
    }


def _share(tokens: int, whole: int) -> str:
    """`1,234 (12.3%)`."""
    return f"{tokens:,} ({tokens / whole:.1%})" if tokens else "-"
