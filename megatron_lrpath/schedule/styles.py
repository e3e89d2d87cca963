"""A schedule and its styles. A style is one row of `STYLES`; a new style needs changes only in this file."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from megatron_lrpath.schedule.curves import (
    Coefficient,
    Exact,
    cosine,
    exact_decimal,
    exponential,
    linear,
    minus_sqrt,
)


class Span(NamedTuple):
    """The position at which a whole schedule is read: `t` positions after its warm-up.

    `length`: positions from the end of the warm-up to the end of the decay. `warmup`: positions of the
    warm-up, the schedule's if the run has none. `unit`: positions that make a step.
    """

    t: Exact
    length: int
    warmup: int
    unit: int


class BranchShape(NamedTuple):
    """The complete decay of a branch: its name, and the rate `t` positions after the branch point of `length`."""

    name: str
    rate: Callable[[Schedule, Exact, int], float]


@dataclass(frozen=True)
class Style:
    """A schedule style: its curves, and facts for plan files, arguments, identity, `advise` and `merge`.

    - `name`: in plan files and arguments; `title`: in the report, as the paper spells it.
    - `whole`: the rate of the whole schedule after its warm-up.
    - `branch_shape`: the complete fast decay of a branch, for a schedule's knobs. The main path is at
      max_lr, so this is only the style's decay, over the whole length of the branch. A style without a
      complete decay has the linear one.
    - `whole_knobs`, `branch_knobs`: the fields of `Schedule` that these read in addition to the rates; the identity
      of a run contains them.
    - `has_cycle`: false if the whole curve depends on the warm-up as its time scale and not on a length.

    Raises TypeError if `branch_shape` is not a function or a knob is not a field of `Schedule`.
    """

    name: str
    whole: Callable[[Schedule, Span], float]
    branch_shape: Callable[[Schedule], BranchShape]
    whole_knobs: tuple[str, ...] = ()
    branch_knobs: tuple[str, ...] = ()
    title: str = ""
    has_cycle: bool = True

    def __post_init__(self) -> None:
        if not callable(self.branch_shape):
            raise TypeError(f"the style {self.name!r} needs a function as its branch_shape")
        if unknown := sorted({*self.whole_knobs, *self.branch_knobs} - KNOBS.keys()):
            raise TypeError(f"the style {self.name!r} reads {', '.join(unknown)}: no knob of Schedule")


STYLES: OrderedDict[str, Style] = OrderedDict()


def register(style: Style) -> None:
    """Add a style. Raise ValueError if there is already a style with its name."""
    if style.name in STYLES:
        raise ValueError(f"there is a style {style.name!r} already")
    STYLES[style.name] = style


def smooth(name: str, coefficient: Coefficient) -> BranchShape:
    """Return the branch shape of a formula for the remaining share of (max−min)."""
    return BranchShape(name, lambda schedule, t, length: held_rate(schedule, t, length, 0, coefficient))


WSD_DECAYS: dict[str, Coefficient] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "minus-sqrt": minus_sqrt,
}
WSD_DECAY_SHAPES = tuple(WSD_DECAYS)


class Knob(NamedTuple):
    """A setting that some styles read: `schema` is its JSON schema in a plan file, `about` its meaning."""

    schema: Mapping[str, Any]
    about: str
    default: Any


def knob(default: Any, schema: Mapping[str, Any], about: str) -> Any:
    """Return a field of `Schedule` that plans set as `schedule.NAME` and arguments as `--lr-path-NAME`."""
    return field(default=default, metadata={"knob": Knob(schema, about, default)})


@dataclass(frozen=True)
class Schedule:
    """The schedule that all runs of a plan have; `LRPath` derives the curve of one run from it.

    The three fractions below are fractions of `D`, the whole schedule after its warm-up (the paper's "half of
    the steps", "80% and 90% of the steps"): a run of 10,000 steps with 2,000 steps of warm-up has D = 8,000,
    and its Knee explores for 4,000 steps after the warm-up. A cycle longer than the run makes D longer, too.

    - `max_lr`, `min_lr`: 0 <= min_lr <= max_lr, finite, max_lr > 0.
    - `warmup`: positions (steps in a plan, samples inside Megatron).
    - `knee_explore`: share of D that Knee stays at `max_lr`; in [0, 1).
    - `multi_step_fractions`: where in D multi-step goes to its middle rate and to `min_lr`; in [0, 1].
    - `wsd_decay_fraction`: the last share of D, in which WSD decays; in (0, 1].
    - `wsd_decay_shape`: one of `WSD_DECAY_SHAPES`, Megatron's formulas.

    Raises ValueError if a knob is out of its range.
    """

    style: str
    max_lr: float
    min_lr: float
    warmup: int = 0
    knee_explore: float = knob(
        0.5,
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "knee: share of the schedule after the warm-up that stays at max_lr",
    )
    multi_step_fractions: tuple[float, float] = knob(
        (0.8, 0.9),
        {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
        "multi-step: shares of the schedule after the warm-up at which the rate goes to √(max_lr·min_lr) "
        "and to min_lr",
    )
    wsd_decay_fraction: float = knob(
        0.1,
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "wsd: the last share of the schedule after the warm-up, in which it decays",
    )
    wsd_decay_shape: str = knob(
        "linear",
        {"type": "string", "enum": list(WSD_DECAY_SHAPES)},
        "wsd: how it decays there, and in a branch",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "multi_step_fractions", tuple(self.multi_step_fractions))
        if not (math.isfinite(self.max_lr) and math.isfinite(self.min_lr)):
            raise ValueError(f"learning rates must be finite (max_lr={self.max_lr}, min_lr={self.min_lr})")
        if self.max_lr <= 0:
            raise ValueError(f"max_lr must be above 0, not {self.max_lr}")
        if self.min_lr < 0:
            raise ValueError(f"min_lr must not be below 0, as {self.min_lr} is")
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr {self.min_lr} is above max_lr {self.max_lr}")
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, not {self.style!r}")
        if self.warmup != int(self.warmup) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number from 0 on, not {self.warmup}")
        self._check_knobs()

    def scaled(self, factor: int) -> Schedule:
        """Return the same schedule in other units: each position becomes `factor` positions."""
        return replace(self, warmup=self.warmup * factor)

    @property
    def middle_lr(self) -> float:
        """Multi-step's middle rate, √(max_lr · min_lr).

        With min_lr = 0 that would be 0, too; the rate is then √0.1 ≈ 31.6% of max_lr, the value at the
        paper's min_lr = 0.1 max_lr.
        """
        if self.min_lr == 0:
            return self.max_lr * math.sqrt(0.1)
        middle = math.sqrt(self.max_lr) * math.sqrt(self.min_lr)
        return min(max(middle, self.min_lr), self.max_lr)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict of the fields; `Schedule(**dict)` is an equal schedule."""
        return asdict(self) | {"multi_step_fractions": list(self.multi_step_fractions)}

    def _check_knobs(self) -> None:
        for name, setting in KNOBS.items():
            schema, value = setting.schema, getattr(self, name)
            if "enum" in schema and value not in schema["enum"]:
                raise ValueError(f"{name} must be one of {', '.join(schema['enum'])}, not {value!r}")
            if schema["type"] == "number" and not within(value, schema):
                raise ValueError(f"{name} must lie in {_interval(schema)}, not be {value}")
        if len(self.multi_step_fractions) != 2:
            raise ValueError(f"multi_step_fractions must be two numbers, not {self.multi_step_fractions}")
        first, second = self.multi_step_fractions
        if not 0 <= first <= second <= 1:
            raise ValueError(f"multi_step_fractions must ascend within [0, 1], unlike {first}, {second}")


def within(value: float, schema: Mapping[str, Any]) -> bool:
    """Return whether a number is in the range of its JSON schema."""
    return (
        value >= schema.get("minimum", -math.inf)
        and value > schema.get("exclusiveMinimum", -math.inf)
        and value <= schema.get("maximum", math.inf)
        and value < schema.get("exclusiveMaximum", math.inf)
    )


def _interval(schema: Mapping[str, Any]) -> str:
    """Format the range of a JSON schema: `[0, 1)`."""
    low = f"[{schema['minimum']}" if "minimum" in schema else f"({schema['exclusiveMinimum']}"
    return low + (f", {schema['maximum']}]" if "maximum" in schema else f", {schema['exclusiveMaximum']})")


KNOBS: dict[str, Knob] = {
    setting.name: setting.metadata["knob"] for setting in fields(Schedule) if "knob" in setting.metadata
}


# Positions are integers or exact fractions and are divided once, at the end: the quotient is correctly
# rounded, so a curve in steps and the same curve in samples agree to the last bit.


def held_rate(schedule: Schedule, t: Exact, length: int, held: Exact, coefficient: Coefficient) -> float:
    """Return max for the share `held` of the length, then the decay down to min at the end."""
    begin = held * length
    if t <= begin:
        return schedule.max_lr
    left = coefficient(float((t - begin) / (length - begin)))
    return min(schedule.max_lr, schedule.min_lr + left * (schedule.max_lr - schedule.min_lr))


def steps_rate(schedule: Schedule, t: Exact, length: int, fractions: tuple[float, float]) -> float:
    """Return max, middle or min; the rate changes at the given shares of the length."""
    first, second = (exact_decimal(fraction) * length for fraction in fractions)
    if t < first:
        return schedule.max_lr
    return schedule.middle_lr if t < second else schedule.min_lr


def inverse_square_root_rate(schedule: Schedule, t: Exact, warmup: int, unit: int) -> float:
    """Return max·√(W / (t+W)), not below min, as Megatron does; `unit` replaces a missing warm-up."""
    ratio = max(warmup, unit) / max(t + warmup, unit)
    return max(schedule.min_lr, schedule.max_lr * math.sqrt(ratio))


def whole_rate(schedule: Schedule, t: Exact, length: float, warmup: int, unit: int) -> float:
    """Return the whole schedule's rate `t` positions after its warm-up; decay over `length` (inf: none)."""
    style = STYLES[schedule.style]
    if not math.isinf(length):
        return style.whole(schedule, Span(t, int(length), warmup, unit))
    return schedule.max_lr if style.has_cycle else style.whole(schedule, Span(t, 0, warmup, unit))


def branch_rate(schedule: Schedule, t: Exact, length: float) -> float:
    """Return the rate of a branch's complete fast decay, `t` positions after the branch point."""
    if math.isinf(length):
        return schedule.max_lr
    return STYLES[schedule.style].branch_shape(schedule).rate(schedule, t, int(length))


def with_branch_shape(schedule: Schedule, shape: str) -> Schedule:
    """Return the schedule with branches of that shape: in its own style, the first other, or WSD's decay.

    Raise ValueError if no style has the shape.
    """
    for name in (schedule.style, *STYLES):
        other = replace(schedule, style=name)
        if STYLES[name].branch_shape(other).name == shape:
            return other
    return replace(schedule, style="wsd", wsd_decay_shape=shape)


WSD_BRANCHES = {name: smooth(name, coefficient) for name, coefficient in WSD_DECAYS.items()}
LINEAR, COSINE = WSD_BRANCHES["linear"], WSD_BRANCHES["cosine"]
# half of the branch at √(max·min), half at min
HALVES = BranchShape("multi-step", lambda schedule, t, length: steps_rate(schedule, t, length, (0.0, 0.5)))

for _style in (
    # min + ½(max−min)(1 + cos πu), u = t/length
    Style(
        "cosine",
        whole=lambda schedule, at: held_rate(schedule, at.t, at.length, 0, cosine),
        branch_shape=lambda schedule: COSINE,
    ),
    # max for `knee_explore` of the length, then linear to min (Iyer et al. 2023)
    Style(
        "knee",
        whole=lambda schedule, at: held_rate(
            schedule, at.t, at.length, exact_decimal(schedule.knee_explore), linear
        ),
        branch_shape=lambda schedule: LINEAR,
        whole_knobs=("knee_explore",),
        title="Knee",
    ),
    # max, √(max·min), min (Bi et al. 2024)
    Style(
        "multi-step",
        whole=lambda schedule, at: steps_rate(schedule, at.t, at.length, schedule.multi_step_fractions),
        branch_shape=lambda schedule: HALVES,
        whole_knobs=("multi_step_fractions",),
    ),
    # max, then `wsd_decay_shape` over the last `wsd_decay_fraction` (Hu et al. and Hägele et al. 2024)
    Style(
        "wsd",
        whole=lambda schedule, at: held_rate(
            schedule,
            at.t,
            at.length,
            1 - exact_decimal(schedule.wsd_decay_fraction),
            WSD_DECAYS[schedule.wsd_decay_shape],
        ),
        branch_shape=lambda schedule: WSD_BRANCHES[schedule.wsd_decay_shape],
        whole_knobs=("wsd_decay_fraction", "wsd_decay_shape"),
        branch_knobs=("wsd_decay_shape",),
        title="WSD",
    ),
    # max − u(max−min)
    Style(
        "linear",
        whole=lambda schedule, at: held_rate(schedule, at.t, at.length, 0, linear),
        branch_shape=lambda schedule: LINEAR,
    ),
    Style("constant", whole=lambda schedule, at: schedule.max_lr, branch_shape=lambda schedule: LINEAR),
    # max·√(W / (t+W)), not below min
    Style(
        "inverse-square-root",
        whole=lambda schedule, at: inverse_square_root_rate(schedule, at.t, at.warmup, at.unit),
        branch_shape=lambda schedule: LINEAR,
        title="inverse square root",
        has_cycle=False,
    ),
):
    register(_style)

if unread := KNOBS.keys() - {name for row in STYLES.values() for name in row.whole_knobs + row.branch_knobs}:
    raise TypeError(f"no style reads {', '.join(sorted(unread))}: name it in the row that does, or remove it")
