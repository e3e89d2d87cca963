"""A flipped bit is refused, named, or without effect; `scripts/flip_bits.py` flips hundreds of bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.checkpoints.reader import COMMON, TRAINING_STATE
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.checkpoint import CheckpointReader
from megatron_lrpath.merge.torch_dist import merge_checkpoints
from megatron_lrpath.runs.checkpoints import MANIFEST, FileSum, ManifestError, read_manifest, write_manifest
from tests.support.flips import BRANCH, CHEAP, MAIN, Flip, build, flip, flip_bits, fresh, stretches, tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained plan; its readers find it under the name `plan` next to it."""
    at = tmp_path_factory.mktemp("flips") / "plan"
    at.mkdir()
    build(at, whole=False)
    return at.rename(at.with_name("base"))


def test_no_flip_is_accepted_in_silence(base: Path) -> None:
    silent: list[Flip] = []

    def note_silent(one: Flip) -> None:
        if one.taken == "silent" or one.trace:
            silent.append(one)

    flips = flip_bits(base, base.with_name("plan"), 50, 1, CHEAP, note_silent)
    assert silent == []
    assert {one.taken for one in flips} >= {"refused", "named"}


def test_every_flipped_bit_of_a_manifest_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000008"
    folder.mkdir()
    write_manifest(
        folder,
        8,
        {"__0_0.distcp": FileSum(7, "a" * 32, {"0+7": "b" * 32}), "common.pt": FileSum(3, "c" * 32)},
    )
    path = folder / MANIFEST
    content = path.read_bytes()
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ManifestError):
            read_manifest(folder)


@pytest.mark.parametrize("part", ["decoder.", COMMON])
def test_a_merge_and_an_export_verify_the_bytes_that_they_read(base: Path, part: str) -> None:
    """The manifest is untouched, and nothing is written."""
    at = base.with_name("plan")
    for run, step in ((BRANCH, 8), (MAIN, 6)):
        fresh(base, at)
        checkpoint = f"{run}/checkpoints/iter_{step:07d}"
        path, begin, end = stretches(checkpoint, part)(at)[0]
        flip(path, (begin + end) // 2, 0)
        with pytest.raises(UserError, match="holds other bytes than were written"):
            CheckpointReader(at / checkpoint).verify(fingerprint=True)
    with pytest.raises(UserError, match="holds other bytes than were written"):
        merge_checkpoints(at / MAIN / "checkpoints", [4, 6], [0.5, 0.5], at / "merged", 6)
    assert not (at / "merged").exists()


def test_a_merge_does_not_depend_on_what_it_does_not_read(base: Path) -> None:
    """Each optimizer state and random state is damaged; the merged tensors have their own checksums."""
    at = base.with_name("plan")
    fresh(base, at)
    root, merged = at / MAIN / "checkpoints", []
    for name in ("undamaged", "damaged"):
        merged.append(merge_checkpoints(root, [4, 6], [0.5, 0.5], at / name, 6))
        CheckpointReader(merged[-1]).verify(fingerprint=True)
        assert any(one.items for one in read_manifest(merged[-1]).values())
        for path, begin, end in stretches(f"{MAIN}/checkpoints/iter_0000006", *TRAINING_STATE)(at):
            flip(path, (begin + end) // 2, 0)
    assert tensors(merged[0]) == tensors(merged[1])


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_an_export_verifies_what_its_fingerprint_is_made_of(base: Path, name: str) -> None:
    at = base.with_name("plan")
    fresh(base, at)
    checkpoint = at / f"{BRANCH}/checkpoints/iter_0000008"
    flip(checkpoint / name, 1, 0)
    with pytest.raises(UserError, match="holds other bytes than were written"):
        CheckpointReader(checkpoint).verify(fingerprint=True)


def test_a_checkpoint_without_a_manifest_is_called_unverified(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = base.with_name("plan")
    fresh(base, at)
    checkpoint = at / f"{BRANCH}/checkpoints/iter_0000008"
    (checkpoint / MANIFEST).unlink()
    CheckpointReader(checkpoint).verify(fingerprint=True)
    assert "read unverified" in capsys.readouterr().err
