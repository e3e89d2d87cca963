"""The paradigms, the kinds of their runs and CPT's variants: one row each, for plans, arguments, launch and
report.

A new paradigm is a row here and the function that makes its runs in `plan.runs`. The module imports no
other module of the package, because the command line reads the names first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    - `prefix`: of the runs' names, before the version's; the whole name for runs without their own version.
    - `shape`: of its learning-rate path (`schedule.SHAPES`).
    - `warms_up`: whether the path begins with a warm-up.
    - `about`: its description, for model cards.
    - `needs_parent`: whether it starts from a checkpoint of another run.
    - `makes_version`: whether its final checkpoint is a version's model.
    - `has_cycle`: whether a plan's `cycle_steps` can set the length of its decay.
    """

    name: str
    prefix: str
    shape: str
    warms_up: bool
    about: str
    needs_parent: bool = False
    makes_version: bool = True
    has_cycle: bool = True

    def run_name(self, version: str) -> str:
        """Return the name of a version's run, or of the single run of all versions."""
        return self.prefix + version if self.makes_version else self.prefix


@dataclass(frozen=True)
class CptVariant:
    """The rate of continual runs: `shape` and `warms_up` replace those of `Kind`.

    With `falls` its maximum is the rate at its first step of one schedule over all steps up to its end, so
    that the maxima fall from version to version.
    """

    name: str
    title: str
    shape: str
    warms_up: bool
    falls: bool = False


@dataclass(frozen=True)
class Paradigm:
    """A method to train the models of a plan's versions.

    - `name`: in plans, folders and arguments; `title`: in tables; `long_name`: the full name.
    - `kinds`: of its runs.
    - `colour`: in figures, from Okabe and Ito's palette for color-blind readers.
    """

    name: str
    title: str
    long_name: str
    kinds: tuple[Kind, ...]
    colour: str


MAIN = Kind(
    "main",
    prefix="main",
    shape="plateau",
    warms_up=True,
    about="the main path of learning-rate path switching (constant rate after the warm-up; not decayed)",
    makes_version=False,
    has_cycle=False,
)
BRANCH = Kind(
    "branch",
    prefix="branch-",
    shape="branch",
    warms_up=False,
    about="a version's branch of learning-rate path switching (a complete decay off the main path)",
    needs_parent=True,
)
SCRATCH = Kind("scratch", prefix="scratch-", shape="whole", warms_up=True, about="pre-training from scratch")
CONTINUAL = Kind(
    "continual",
    prefix="continual-",
    shape="whole",
    warms_up=False,
    about="continual pre-training from the version before it",
    needs_parent=True,
)
SFT = Kind(
    "sft",
    prefix="sft-",
    shape="whole",
    warms_up=True,
    about="fine-tuning of a version on chats or instructions, loss on the answers only",
    needs_parent=True,
    has_cycle=False,
)

OURS = Paradigm("ours", "Ours", "learning-rate path switching", (MAIN, BRANCH), "#009E73")
PTFS = Paradigm("ptfs", "PTFS", "pre-training from scratch", (SCRATCH,), "#0072B2")
CPT = Paradigm("cpt", "CPT", "continual pre-training", (CONTINUAL,), "#D55E00")

PARADIGM_ROWS = {paradigm.name: paradigm for paradigm in (OURS, PTFS, CPT)}
PARADIGMS = tuple(PARADIGM_ROWS)
"""The names, in the order of all tables."""

LR_PATH_KINDS = {kind.name: kind for paradigm in PARADIGM_ROWS.values() for kind in paradigm.kinds}
"""The kinds of pre-trainings of the paradigms; the versions of each paradigm can also be fine-tuned."""
PARADIGM_OF = {kind.name: paradigm.name for paradigm in PARADIGM_ROWS.values() for kind in paradigm.kinds}
KINDS = LR_PATH_KINDS | {SFT.name: SFT}
CYCLE_KINDS = tuple(kind.name for row in PARADIGM_ROWS.values() for kind in row.kinds if kind.has_cycle)

RESET_MAX = CptVariant("reset-max", "ResetMax", shape="whole", warms_up=False)
REWARM_MAX = CptVariant("rewarm-max", "RewarmMax", shape="whole", warms_up=True)
KEEP_MIN = CptVariant("keep-min", "KeepMin", shape="floor", warms_up=False)
AUTOREGRESSIVE = CptVariant("autoregressive", "Autoregressive", shape="whole", warms_up=True, falls=True)
CPT_VARIANTS = {variant.name: variant for variant in (RESET_MAX, REWARM_MAX, KEEP_MIN, AUTOREGRESSIVE)}


def path_form(kind: str, cpt_variant: str) -> tuple[str, bool]:
    """Return the shape of the learning-rate path of a kind of run, and whether it begins with a warm-up."""
    form = CPT_VARIANTS[cpt_variant] if kind == CONTINUAL.name else KINDS[kind]
    return form.shape, form.warms_up
