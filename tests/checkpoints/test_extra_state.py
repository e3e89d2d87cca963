"""An extra state that Transformer Engine would unpickle is empty or safe, shown with a stand-in."""

from __future__ import annotations

import enum
import io
import os
import pickle
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_lrpath.checkpoints import objects
from megatron_lrpath.checkpoints.extra_state import harmless
from megatron_lrpath.checkpoints.pickle_data import NotDataError
from megatron_lrpath.errors import UserError

RECIPES = "transformer_engine.common.recipe"
NAME = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """The class of Transformer Engine, copied."""

    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


@dataclass(frozen=True)
class MMParams:
    """The class of Transformer Engine, copied."""

    use_split_accumulator: bool = True


@dataclass
class DelayedScaling:
    """The class of Transformer Engine, copied."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    fp8_gemm_fprop: MMParams = field(default_factory=MMParams)

    def __post_init__(self) -> None:
        if type(self.margin) is not int:
            raise ValueError("margin")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return a stand-in for Transformer Engine's recipes, importable under their name."""
    module = types.ModuleType(RECIPES)
    for one in (_FormatHelper, Format, MMParams, DelayedScaling):
        monkeypatch.setattr(one, "__module__", RECIPES)
        setattr(module, one.__name__, one)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, RECIPES, module)
    return module


def packed(state: object) -> torch.Tensor:
    """Return a state in the form in which Transformer Engine 2 stores it."""
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def unpacked(stored: torch.Tensor) -> Any:
    """Return a state unpickled without restrictions, as Transformer Engine does."""
    return pickle.loads(stored.detach().cpu().numpy().tobytes())


class Command:
    """Runs a command when it is unpickled without restrictions."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.trap}",)


def saved(value: object) -> bytes:
    """Return an object of a checkpoint as bytes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("empty", [None, torch.empty(0, dtype=torch.uint8), [None], [torch.empty(0)]])
def test_an_empty_extra_state_keeps_its_bytes(empty: object) -> None:
    assert objects.checked_bytes(NAME, saved(empty)) == saved(empty)


def test_version_1_saves_none_in_an_archive_which_arrives_as_none() -> None:
    stored = objects.checked_bytes(NAME, saved([io.BytesIO(saved(None))]))
    assert objects.load(io.BytesIO(stored)) == [None]


def test_a_state_of_fp8_arrives_as_it_was_pickled_by_us(engine: types.ModuleType) -> None:
    state = {
        "recipe": DelayedScaling(margin=2, fp8_format=Format.E4M3, fp8_gemm_fprop=MMParams(False)),
        "scale_fwd": torch.arange(6.0),
        "amax_history_bwd": torch.rand(4, 3).t(),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_group": None, "sizes": (1, [2.5, "x"])},
    }
    stored = objects.load(io.BytesIO(objects.checked_bytes(NAME, saved([packed(state)]))))
    found = unpacked(stored[0])
    assert found["recipe"] == state["recipe"]
    assert found["extra_fp8_variables"] == state["extra_fp8_variables"]
    for name in ("scale_fwd", "amax_history_bwd"):
        assert torch.equal(found[name], state[name])  # type: ignore[arg-type]


def test_a_command_in_one_is_refused_and_not_run(tmp_path: Path, engine: types.ModuleType) -> None:
    trap = tmp_path / "executed"
    inner = pickle.dumps({"scale_fwd": Command(trap)})
    states = [
        packed(Command(trap)),
        packed({"recipe": Command(trap)}),
        packed({"extra_fp8_variables": {"x": Command(trap)}}),
        packed({"scale_fwd": torch.serialization._get_layout}),
        packed(DelayedScaling(margin="x" if False else 1)),
        packed({"scale_fwd": torch.ones(2), "other": 1}),
        packed({"scale_fwd": torch.ones(2, dtype=torch.float64)}),
        torch.frombuffer(bytearray(inner[:-3]), dtype=torch.uint8),
        torch.ones(3),
        io.BytesIO(b"x"),
        io.BytesIO(saved(Command(trap))),
        io.BytesIO(saved({"scale_fwd": torch.ones(2)})),
        io.BytesIO(saved(None)[:-40]),
        5,
    ]
    for state in states:
        with pytest.raises(NotDataError):
            harmless([state])
    with pytest.raises(UserError, match=r"_extra_state.*holds more than data.*os\.system|posix\.system"):
        objects.checked_bytes(NAME, saved([packed(Command(trap))]))
    assert not trap.exists()
    unpacked(packed(Command(trap)))
    assert trap.exists()  # the trap works in an unchecked load


def test_a_storage_with_a_pickle_of_its_own_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    content = pickle.dumps({"scale_fwd": torch.ones(2)})
    evil = pickle.dumps(Command(trap))
    packed_bytes = content.index(b"B", content.index(b"_load_from_bytes"))
    hostile = content[: packed_bytes + 1] + len(evil).to_bytes(4, "little") + evil
    hostile += content[content.index(b"\x94\x85", packed_bytes) :]
    hostile = hostile[:2] + hostile[11:]  # without the frame
    with pytest.raises(NotDataError):
        harmless(torch.frombuffer(bytearray(hostile), dtype=torch.uint8))
    assert not trap.exists()


def test_none_may_hide_among_other_objects() -> None:
    hidden = {"model": {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.ones(3, dtype=torch.uint8)}}
    with pytest.raises(UserError, match="where none belongs"):
        objects.checked_bytes("common_state/shard_0_1", saved([hidden]))


def test_without_transformer_engine_a_recipe_is_refused(
    engine: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = packed({"recipe": DelayedScaling()})
    monkeypatch.setitem(sys.modules, RECIPES, None)
    with pytest.raises(NotDataError, match="Transformer Engine is installed"):
        harmless(stored)
