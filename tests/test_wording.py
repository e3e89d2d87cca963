"""Numbers as text."""

import pytest

from megatron_lrpath.wording import (
    byte_size,
    clauses,
    clock,
    duration,
    listing,
    nearest,
    plural,
    short_number,
)


def test_counts() -> None:
    assert [plural(1, "run"), plural(0, "run"), plural(1200, "run")] == ["1 run", "0 runs", "1,200 runs"]
    assert plural(2, "process", "es") == "2 processes"


@pytest.mark.parametrize(
    ("number", "text"), [(812, "812"), (4100, "4.1K"), (999_800, "1M"), (52.4e6, "52.4M"), (10.5e9, "10.5B")]
)
def test_large_numbers_have_three_digits(number: float, text: str) -> None:
    assert short_number(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (820, "820 bytes"), (1500, "1.5 kB"), (1.3e9, "1.3 GB"), (2e13, "20.0 TB")],
)
def test_sizes(number: float, text: str) -> None:
    assert byte_size(number) == text


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [
        (4.25, "4.2 s", "0:04"),
        (48, "48 s", "0:48"),
        (185, "3 min 05 s", "3:05"),
        (7620, "2 h 07 min", "2:07:00"),
        (273_600, "3 d 4 h", "3 d 4 h"),
    ],
)
def test_durations(seconds: float, long: str, short: str) -> None:
    assert (duration(seconds), clock(seconds)) == (long, short)


def test_lists_and_near_names() -> None:
    assert [listing(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert [listing(["a", "b", "c"], most) for most in (1, 2, 3)] == [
        "a and 2 more",
        "a, b and 1 more",
        "a, b and c",
    ]
    assert [clauses(["a", "b", "c"], most) for most in (2, 3)] == ["a; b; and 1 more", "a; b; c"]
    assert nearest("cosin", ["cosine", "wsd"]) == " (did you mean 'cosine'?)"
    assert nearest("xyz", ["cosine", "wsd"]) == ""
