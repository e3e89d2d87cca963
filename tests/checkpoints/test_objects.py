"""Objects of a checkpoint: data that Megatron stores are loaded; anything with a side effect is refused."""

from __future__ import annotations

import io
import signal
from argparse import Namespace
from collections import OrderedDict
from pathlib import PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.rerun_state_machine import RerunState
from megatron.core.transformer.enums import AttnBackend

from megatron_lrpath.checkpoints import objects
from megatron_lrpath.checkpoints.pickle_data import NotDataError


def saved(value: object) -> io.BytesIO:
    """Return a stream with an object of a checkpoint."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


@pytest.mark.parametrize(
    "value",
    [
        {"args": Namespace(a=1, dtype=torch.bfloat16, path=PosixPath("/a/b"), on=AttnBackend.flash)},
        [OrderedDict(a=1), {1, 2}, 1 + 2j, 2**100, -1, "ü", b"x", None, True, torch.Size([2])],
        {"signal": signal.SIGTERM, "state": RerunState.NOT_RUNNING_YET},
        {(1, "a"): 2, 3: {}},
    ],
)
def test_data_are_loaded(value: Any) -> None:
    assert objects.load(saved(value)) == value


def test_random_states_are_loaded() -> None:
    state = ("MT19937", np.arange(624, dtype=np.uint32), 624, 0, 0.0)
    loaded = objects.load(saved([{"np": state, "torch": torch.get_rng_state()}]))[0]
    assert np.array_equal(loaded["np"][1], state[1])
    assert torch.equal(loaded["torch"], torch.get_rng_state())
    assert vars(objects.load(saved(OptimizerConfig(lr=0.5))))["lr"] == 0.5


class Reduced:
    """A call with arguments and a state."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


@pytest.mark.parametrize(
    "value",
    [
        Reduced(AttnBackend, (1,), {"changed": 1}),
        Reduced(signal.Signals, (15,), {"changed": 1}),
        Reduced(np.dtype, ("f8", False, False), (3, ">", None, None, None, -1, -1, 0)),
        Reduced(np.dtype, ("f8",)),
        Reduced(torch.Size, ((1,),), {"changed": 1}),
        Reduced(Namespace, (), (None, {"__class__": 1})),
        Reduced(OrderedDict, ([("model._extra_state", 1)],)),
        {"x._extra_state": 1},
        print,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_changes_something_is_refused_and_leaves_nothing(value: Any) -> None:
    def seen() -> list[Any]:
        return [dict(vars(AttnBackend.flash)), dict(vars(signal.SIGTERM)), np.dtype("f8").str]

    before = seen()
    with pytest.raises(NotDataError):
        objects.load(saved(value))
    assert seen() == before


def test_a_tensor_is_one_tensor() -> None:
    assert torch.equal(objects.load(saved(torch.ones(2)), tensor=True), torch.ones(2))
    for value in ([torch.ones(2)], Namespace(), 1):
        with pytest.raises(NotDataError):
            objects.load(saved(value), tensor=True)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02N.", saved([1]).getvalue()[:-30]],
    ids=["empty", "zip", "pickle", "cut"],
)
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(NotDataError):
        objects.load(io.BytesIO(content))
