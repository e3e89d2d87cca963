"""Hostile pickles have no effect on the interpreter that reads them, and the oracle detects effects."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

from tests.support.training_fixtures import launch

INPUTS = 500


def fuzz(argv: list[str]) -> None:
    """Read the inputs of a seed in the folder `argv[0]`."""
    from scripts import fuzz_checkpoints as fuzzer

    bad, ended = fuzzer.fuzz(INPUTS, int(argv[1]), fuzzer.Oracle(), Path(argv[0]))
    print(bad[:3])
    print(f"{len(bad)} of {INPUTS} with an effect, {ended['read'] > 20} {ended['refused'] > 20}")


def test_500_hostile_pickles_have_no_effect(tmp_path: Path) -> None:
    outcome = launch("tests.checkpoints.test_fuzz:fuzz", [str(tmp_path), "7"]).ok()
    assert f"0 of {INPUTS} with an effect, True True" in outcome.output, outcome.output[-3000:]


class Member:
    """Sets an attribute of a member of an enumeration, which torch's weights-only loading allows."""

    def __reduce__(self) -> object:
        from megatron.core.transformer.enums import AttnBackend

        return AttnBackend, (1,), {"changed": 1}


class Command:
    """Runs a command."""

    def __reduce__(self) -> object:
        return os.system, ("touch effect",)


def see_effects(argv: list[str]) -> None:
    """Have the effects that a file must not have, while the oracle watches."""
    import torch
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from scripts import fuzz_checkpoints as fuzzer

    os.chdir(argv[0])
    oracle = fuzzer.Oracle()
    stream = io.BytesIO()
    torch.save([Member()], stream)
    stream.seek(0)
    acts = {
        "class": lambda: setattr(MetadataIndex, "parent", 1),
        "member": lambda: torch.load(stream, weights_only=True),
        "command": lambda: pickle.loads(pickle.dumps(Command())),
        "nothing": lambda: None,
    }
    for name, act in acts.items():
        effects: list[str] = []
        with oracle.watching(effects):
            act()
        print(f"{name}: {bool(effects)}")


def test_the_oracle_sees_an_effect(tmp_path: Path) -> None:
    outcome = launch("tests.checkpoints.test_fuzz:see_effects", [str(tmp_path)]).ok()
    for line in ("class: True", "member: True", "command: True", "nothing: False"):
        assert line in outcome.output, outcome.output[-2000:]
