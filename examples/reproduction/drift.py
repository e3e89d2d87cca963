"""Versions that drift: models of the novels by the period of the text, with replay and with its rivals."""

from __future__ import annotations

from collections.abc import Iterator

from certainty import difference_said
from findings import LATER, Finding
from measured import Measured, Model, said

EXPERIMENTS = ("novels", "novels-replay", "novels-cpt")
PERIODS = ("v1", "v2", "v3", "v4")
"""Domains of the validation text, by the version that has the text of the period."""
PTFS, OURS, OURS_REPLAY = ("cosine", "ptfs"), ("cosine", "ours"), ("alpha0.6", "ours")
CPT, CPT_REPLAY, CPT_FALLING = ("cosine", "cpt"), ("reset-max_replay0.2", "cpt"), ("autoregressive", "cpt")
CPT_FALLING_REPLAY = ("autoregressive_replay0.2", "cpt")
MODELS = {
    "PTFS (cosine)": PTFS,
    "Ours, α = 0.6": OURS,
    "Ours, α = 0.6, replay": OURS_REPLAY,
    "Ours, α = 0.4, replay": ("alpha0.4", "ours"),
    "CPT (ResetMax)": CPT,
    "CPT (ResetMax), replay": CPT_REPLAY,
    "CPT (autoregressive)": CPT_FALLING,
    "CPT (autoregressive), replay": CPT_FALLING_REPLAY,
}
"""Variation and paradigm of each model, by its name in the tables."""
TEXTS = {
    "all text": {
        f"{version}/{period}": 1 / (len(LATER) * len(PERIODS)) for version in LATER for period in PERIODS
    },
    "old text": {
        f"{version}/{period}": 1 / (len(LATER) * number)
        for number, version in enumerate(LATER, start=1)
        for period in PERIODS[:number]
    },
    "new text": {f"{version}/{version}": 1 / len(LATER) for version in LATER},
}
"""Weights of the losses of `VERSION/PERIOD`: the mean over v2 to v4, and over the periods that the text is of."""


def load() -> Measured:
    """Return the models of the three experiments; each version is `VERSION/PERIOD` of the validation text."""
    return Measured(row for name in EXPERIMENTS for row in Measured.by_domain(name).rows)


def on(text: str, model: tuple[str, str]) -> dict[Model, float]:
    """Return the weights of a model's mean loss on a kind of text."""
    return {(*model, place): weight for place, weight in TEXTS[text].items()}


def period_lines() -> list[list[str]]:
    """Return for every version and model the perplexities by period."""
    measured = load()
    lines = []
    for version in LATER:
        for name, model in MODELS.items():
            found = [measured.at(*model, f"{version}/{period}") for period in PERIODS]
            if any(found):
                lines.append([version, name, *(said([*one.values()]) for one in found)])
    return lines


def against_ptfs() -> list[list[str]]:
    """Return for every other model its cost and, by kind of text, its perplexity over that of PTFS, less 1."""
    measured = load()
    costs = {(row.variation, row.paradigm): row.cost for row in measured.rows}
    lines = []
    for name, model in MODELS.items():
        if model == PTFS or model not in costs:
            continue
        gaps = [measured.difference(on(text, model), on(text, PTFS), paired=False) for text in TEXTS]
        lines.append([name, f"{costs[model]:.2f}", *map(difference_said, gaps), str(gaps[0].seeds)])
    return lines


def findings() -> Iterator[Finding]:
    """Yield the findings on replay, and on CPT whose maxima fall from version to version."""
    measured, names = load(), {model: name for name, model in MODELS.items()}
    for says, text, over, under, main in (
        ("Replay improves ours on old text", "old text", OURS, OURS_REPLAY, True),
        ("Replay improves ours on new text", "new text", OURS, OURS_REPLAY, False),
        ("Ours with replay is not behind PTFS", "all text", PTFS, OURS_REPLAY, True),
        ("Ours with replay is not behind PTFS", "old text", PTFS, OURS_REPLAY, False),
        ("Ours with replay is ahead of CPT with replay", "all text", CPT_REPLAY, OURS_REPLAY, True),
        ("Replay improves CPT on old text", "old text", CPT, CPT_REPLAY, False),
        ("Replay improves CPT on new text", "new text", CPT, CPT_REPLAY, False),
        ("Falling maxima improve CPT", "all text", CPT, CPT_FALLING, False),
        ("Falling maxima improve CPT on old text", "old text", CPT, CPT_FALLING, False),
        ("Falling maxima improve CPT with replay", "all text", CPT_REPLAY, CPT_FALLING_REPLAY, False),
    ):
        measure = f"novels, {text}, mean of v2–v4: {names[over]} / {names[under]} − 1"
        same_batches = {over, under} in ({CPT, CPT_FALLING}, {CPT_REPLAY, CPT_FALLING_REPLAY})
        difference = measured.difference(on(text, over), on(text, under), paired=same_batches)
        yield Finding(says, measure, difference, main)
