"""TensorBoard's files of a run: remove the points of steps that a restart trains again.

A killed training has written points of steps after its last checkpoint, which TensorBoard would show
twice: its own mark for a restart (`purge_step`) has one axis, and a run's curves have three.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.errors import cause
from megatron_lrpath.training.steps import GROUP

PATTERN = "events.out.tfevents.*"
OF_SAMPLES = " vs samples"  # how Megatron ends the names of its curves over samples
LENGTH, AROUND = (
    struct.Struct("<Q"),
    16,
)  # a record: its length and that one's checksum, the bytes, their checksum


def forget_from(folder: Path, step: int, samples: int, sample_tokens: int, own: Path) -> None:
    """Remove the points of `step` and later steps from a run's event files in `folder`.

    A file is written in the order of the steps, so these points are at its end. A warning names a folder
    that is not writable.

    Args:
        folder: of TensorBoard's files.
        step: the first step to train (1-based), or the one before, if a run begins with a point of it.
        samples: consumed after that step; `sample_tokens`: tokens of a sample. For curves over those.
        own: the file of this process, which is not changed.
    """
    firsts = (step, samples, samples * sample_tokens)
    for file in sorted(folder.glob(PATTERN)):
        if file.name == own.name:
            continue
        try:
            end = end_before(file.read_bytes(), firsts)
            if end is not None:
                os.truncate(file, end)
        except OSError as error:
            warn(f"{file}: {cause(error)}; TensorBoard shows the steps that are trained again twice.")
            return


def end_before(content: bytes, firsts: tuple[int, int, int]) -> int | None:
    """Return the end of an event file without its points from `firsts` on (in steps, samples, tokens).

    Return None if it has no such points, or if it is unreadable before an incomplete last record.
    """
    # Takes a while, and the first start of a run has no files.
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    end = None
    for begin, length in reversed(records(content)):
        try:
            event = Event.FromString(content[begin + 12 : begin + 12 + length])
        except DecodeError:
            return None
        values = event.summary.value
        if values and all(event.step < first_of(value.tag, firsts) for value in values):
            break
        if values:
            end = begin
    return end


def records(content: bytes) -> list[tuple[int, int]]:
    """Yield the complete records of an event file: their offsets and the lengths of their content."""
    found, place = [], 0
    while place + AROUND <= len(content):
        (length,) = LENGTH.unpack_from(content, place)
        if place + AROUND + length > len(content):
            break
        found.append((place, length))
        place += AROUND + length
    return found


def first_of(tag: str, firsts: tuple[int, int, int]) -> int:
    """Return the first point to remove from the curve with this name, on its axis."""
    step, samples, tokens = firsts
    if tag.startswith(f"{GROUP}/"):
        return tokens
    return samples if tag.endswith(OF_SAMPLES) else step


def file_of(writer: Any) -> Path | None:
    """Return the file of torch's SummaryWriter; None if it is not available."""
    try:
        return Path(writer.file_writer.event_writer._file_name)
    except AttributeError:
        return None
