"""The look that the report's figures share, and their two file forms: inline SVG and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from megatron_lrpath.paradigms import PARADIGM_ROWS

COLOURS = {name: paradigm.colour for name, paradigm in PARADIGM_ROWS.items()}
INK, SOFT, GRID = "#1f2328", "#59636e", "#e4e7eb"
LABEL_GROUND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.75}
WIDTH = 9.6
"""Inches; the page draws the figures at its own width, so this sets the size of the letters alone."""

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 10,
    "axes.edgecolor": "#9aa4af",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "svg.fonttype": "none",
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its short name (of files and ids), title, caption, both forms and data.

    `data` is the CSV's text, `caption` plain text, `svg` markup that is safe to stand in an HTML page.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    data: str


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw in the report's style, whatever the user's matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def shade(paradigm: str, position: float) -> str:
    """The paradigm's colour, from light (`position` 0: the first version) to dark (1: the last)."""
    return _mixed(COLOURS[paradigm], 1.0 if position < 0.5 else 0.0, 0.42 * abs(1 - 2 * position))


def darker(colour: str) -> str:
    """The colour for letters: a pale line can be seen where pale letters cannot be read."""
    return _mixed(colour, 0.0, 0.25)


def _mixed(colour: str, towards: float, amount: float) -> str:
    """`colour` with a share of black (`towards` 0) or white (1)."""
    red, green, blue = ((1 - amount) * part + amount * towards for part in to_rgb(colour))
    return to_hex((red, green, blue))


def version_shade(paradigm: str, index: int, versions: int) -> str:
    """The shade of version `index` (from 1) among `versions`; a lone version has the plain colour."""
    return shade(paradigm, (index - 1) / (versions - 1) if versions > 1 else 0.5)


def mark_versions(axes: Axes, ends: list[int]) -> None:
    """Faint upright lines where a version's data end, all but the last."""
    for end in ends[:-1]:
        axes.axvline(end, color="#b6bec8", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0.5)


def finished(figure: Figure, name: str, title: str, caption: str, data: str) -> Drawing:
    """Lay the figure out once and put it into both forms."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return Drawing(name, title, caption, to_svg(figure, name, caption), to_png(figure), data)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline `<svg>`: scales with its place, speaks the page's font, ids of its own."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--figure-font, sans-serif)", svg)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _svg_tag(label), svg, count=1)


def _svg_tag(label: str) -> str:
    return (
        rf'<svg viewBox="\g<1>" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" '
        r'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG of 160 dots per inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()
