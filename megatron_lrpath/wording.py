"""Numbers, sizes, durations and lists as text, the same in every command, message and report."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MISSING = "–"


def plural(number: int, noun: str, ending: str = "s") -> str:
    """Format a count with its noun: `1 run`, `2 runs`, `2 processes` (ending `es`)."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def short_number(value: float) -> str:
    """Format a large count with three digits: 812, 4.1K, 52.4M, 10.5B."""
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "K"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if abs(value) < limit * 0.9995:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value / 1e12:.3g}T"


def byte_size(number: float) -> str:
    """Format a number of bytes: `820 bytes`, `1.3 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float | None) -> str:
    """Format a duration: `48 s`, `3 min 05 s`, `2 h 07 min`, `3 d 4 h`; a dash if it is unknown."""
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def hours_text(hours: float, unit: str) -> str:
    """Format hours: `1,234.5 GPU hours`; `unit` is the resource: a GPU or a process."""
    return f"{hours:,.1f} {unit} hours" if hours >= 0.1 else f"less than 0.1 {unit} hours"


def clock(seconds: float) -> str:
    """Format a duration for a narrow column: `m:ss`, `h:mm:ss`, or days and hours."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def decimals(values: Sequence[float]) -> int:
    """Return the number of decimals for perplexities: two as in the paper, three if one is below 10."""
    return 3 if values and min(values) < 10 else 2


def signed_percent(value: float) -> str:
    """Format a relative change with its sign: `+2.1%`, `−0.4%`."""
    return f"{value:+.1%}".replace("-", "−")


def listing(items: Sequence[str], most: int | None = None) -> str:
    """Join items to a list: `a`, `a and b`, `a, b and c`; of more than `most` the first ones: `a, b and 5 more`."""
    if most is not None and len(items) > most:
        items = [*items[:most], f"{len(items) - most:,} more"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def clauses(items: Sequence[str], most: int) -> str:
    """Join clauses: `a; b`; of more than `most` the first ones: `a; b; and 5 more`."""
    rest = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return "; ".join([*items[:most], *rest])


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` if one of the known names is similar, else an empty text."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
