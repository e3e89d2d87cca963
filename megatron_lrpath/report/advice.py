"""What `lrpath advise` has left for the report: its sentences, and the figure of curves and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.style import Drawing
from megatron_lrpath.runs.folder import read_json_object

NAME = "advice"  # of the folder in the plan's output, and of the files in it


@dataclass(frozen=True)
class SavedAdvice:
    """Advice in words, when it was given (text), and its figure."""

    written: str
    sentences: tuple[str, ...]
    drawing: Drawing


def save_advice(plan: Plan, advice: SavedAdvice, facts: dict[str, object]) -> Path:
    """Write the advice beside the plan's runs, `facts` (JSON values) with it; the folder.

    An earlier one is replaced. The words come last: without them there is no advice.
    """
    folder = Path(plan.output) / NAME
    atomic_write_text(folder / f"{NAME}.svg", advice.drawing.svg)
    atomic_write_bytes(folder / f"{NAME}.png", advice.drawing.png)
    atomic_write_text(folder / f"{NAME}.csv", advice.drawing.data)
    said = {"written": advice.written, "title": advice.drawing.title, "caption": advice.drawing.caption}
    atomic_write_json(folder / f"{NAME}.json", {**said, "sentences": list(advice.sentences), **facts})
    return folder


def read_advice(plan: Plan) -> SavedAdvice | None:
    """The advice that was given last; None where there is none, or where it cannot be read."""
    folder = Path(plan.output) / NAME
    said = read_json_object(folder / f"{NAME}.json")
    try:
        if said is None:
            return None
        svg, data = ((folder / f"{NAME}.{kind}").read_text(encoding="utf-8") for kind in ("svg", "csv"))
        drawing = Drawing(
            NAME, said["title"], said["caption"], svg, (folder / f"{NAME}.png").read_bytes(), data
        )
        return SavedAdvice(said["written"], tuple(said["sentences"]), drawing)
    except (OSError, ValueError, KeyError, TypeError):
        return None
