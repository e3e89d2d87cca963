"""The common part of the figures: look, panels, labels, file formats; and the figure of `lrpath advise`."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from megatron_lrpath.files import atomic_write_bytes, atomic_write_text
from megatron_lrpath.paradigms import PARADIGM_ROWS
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.wording import paradigm_name, step_tokens_text
from megatron_lrpath.runs.folder import read_json_object
from megatron_lrpath.sealed import write_sealed
from megatron_lrpath.wording import listing

COLOURS = {name: paradigm.colour for name, paradigm in PARADIGM_ROWS.items()}
INK, SOFT, GRID = "#1f2328", "#59636e", "#e4e7eb"
LABEL_GROUND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.75}
WIDTH = 9.6
"""Inches; the page draws the figures at its own width, so this only determines the size of the letters."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

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

    `data` is the CSV's text, `caption` plain text, `svg` markup that is safe in an HTML page, unless it was
    read from a file (`from_file`): then it is shown as an image, which cannot run or load anything.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    data: str
    from_file: bool = False


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw in the report's style, regardless of the user's matplotlib settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def darker(colour: str) -> str:
    """Return a darker color for letters, which would be hard to read in the color of a pale line."""
    return _mixed(colour, 0.0, 0.25)


def _mixed(colour: str, towards: float, amount: float) -> str:
    """Return `colour` mixed with a share of black (`towards` 0) or white (1)."""
    red, green, blue = ((1 - amount) * part + amount * towards for part in to_rgb(colour))
    return to_hex((red, green, blue))


def version_shade(paradigm: str, index: int, versions: int) -> str:
    """Return the paradigm's color, from light (version 1) to dark (the last); plain for a single version."""
    position = (index - 1) / (versions - 1) if versions > 1 else 0.5
    return _mixed(COLOURS[paradigm], 1.0 if position < 0.5 else 0.0, 0.42 * abs(1 - 2 * position))


def run_colour(plan: Plan, run: Run) -> str:
    """Return the version's shade of the paradigm's color; gray for the main path."""
    count = len(plan.versions)
    return version_shade(run.paradigm, run.version_index, count) if run.makes_version else SOFT


def paradigm_panels(plan: Plan, paradigms: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure (`height` in inches) with a panel over steps, title and version ends per paradigm."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    column = figure.subplots(len(paradigms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, paradigm in zip(column, paradigms, strict=True):
        title = f"{paradigm_name(plan, paradigm)}: {PARADIGM_ROWS[paradigm].long_name}"
        axes.set_title(title, color=darker(COLOURS[paradigm]))
        mark_versions(axes, plan.timeline.ends)
    column[-1].set_xlim(0, plan.timeline.ends[-1] * 1.06)
    column[-1].set_xlabel(f"training step (each of {step_tokens_text(plan)} tokens)")
    column[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure, dict(zip(paradigms, column, strict=True))


def rate_panels(plan: Plan, paradigms: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes], float]:
    """Return panels of learning rates, see `paradigm_panels`, and the power of 10 that is their unit."""
    figure, panels = paradigm_panels(plan, paradigms, height)
    power = math.floor(math.log10(plan.highest_rate))
    label = f"learning rate (10{str(power).translate(SUPERSCRIPTS)})" if power else "learning rate"
    for axes in panels.values():
        axes.set_ylabel(label)
        axes.set_ylim(0, plan.highest_rate / 10.0**power * 1.16)
    return figure, panels, 10.0**power


def name_curve(axes: Axes, run: Run, place: tuple[float, float], colour: str, above: bool = False) -> None:
    """Write the version's name above a point of its curve, or to the right of it; the main path's always above."""
    above = above or not run.makes_version
    text = "main path" if not run.makes_version else run.version
    offset, align = ((0, 5), ("center", "bottom")) if above else ((5, 0), ("left", "center"))
    write_label(axes, text, place, offset, colour, align, fontsize=9.5, annotation_clip=False)


def write_label(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    align: tuple[str, str] = ("center", "bottom"),
    **look: Any,
) -> None:
    """Write in bold letters next to a point, at `offset` in typographic points; `look` as for `annotate`."""
    look |= {"ha": align[0], "va": align[1], "color": darker(colour), "fontweight": "bold"}
    axes.annotate(text, place, xytext=offset, textcoords="offset points", bbox=LABEL_GROUND, **look)


def mark_versions(axes: Axes, ends: list[int]) -> None:
    """Draw thin vertical lines at the ends of the versions' data, except the last."""
    for end in ends[:-1]:
        axes.axvline(end, color="#b6bec8", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0.5)


def finished(figure: Figure, name: str, title: str, caption: str, data: str) -> Drawing:
    """Lay the figure out once and convert it to both formats."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return Drawing(name, title, caption, to_svg(figure, name, caption), to_png(figure), data)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an inline `<svg>`: scales with its place, has the page's font and unique ids."""
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
    tag = (
        rf'<svg viewBox="\g<1>" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" '
        r'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', tag, svg, count=1)


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG with 160 dots per inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


ADVICE = "advice"  # the name of the folder in the plan's output, and of the files in it


@dataclass(frozen=True)
class SavedAdvice:
    """The sentences of an advice, its time (text), and its figure."""

    written: str
    sentences: tuple[str, ...]
    drawing: Drawing


def save_advice(plan: Plan, advice: SavedAdvice, facts: dict[str, object]) -> Path:
    """Write the advice with its `facts` (JSON values) next to the plan's runs; return the folder.

    An earlier advice is replaced. The sentences are written last: without them there is no advice.
    """
    folder = Path(plan.output) / ADVICE
    atomic_write_text(folder / f"{ADVICE}.svg", advice.drawing.svg)
    atomic_write_bytes(folder / f"{ADVICE}.png", advice.drawing.png)
    atomic_write_text(folder / f"{ADVICE}.csv", advice.drawing.data)
    text = {"written": advice.written, "title": advice.drawing.title, "caption": advice.drawing.caption}
    write_sealed(folder / f"{ADVICE}.json", {**text, "sentences": list(advice.sentences), **facts})
    return folder


def read_advice(plan: Plan) -> SavedAdvice | None:
    """Return the last advice; None if there is none, or it cannot be read."""
    folder = Path(plan.output) / ADVICE
    text = read_json_object(folder / f"{ADVICE}.json")
    try:
        if text is None:
            return None
        svg, data = ((folder / f"{ADVICE}.{kind}").read_text(encoding="utf-8") for kind in ("svg", "csv"))
        drawing = Drawing(
            ADVICE, text["title"], text["caption"], svg, (folder / f"{ADVICE}.png").read_bytes(), data, True
        )
        names, sentences = [version.name for version in plan.versions], list(text["sentences"])
        advised = list(text["candidates"][0]["versions"]) if text.get("candidates") else names
        if advised != names:
            sentences.append(
                f"This advice is for {listing(advised)}; the plan has {listing(names)}. Ask again: lrpath advise "
                f"{plan.path}"
            )
        return SavedAdvice(text["written"], tuple(sentences), drawing)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
