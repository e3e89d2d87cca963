"""TensorBoard's files of a run: before a start goes on, what earlier ones wrote of the steps that it trains again.

A killed training has written steps after its last checkpoint. TensorBoard would show them twice: its own mark for a
restart (`purge_step`) knows one axis, and a run's curves have three.
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
    """Cut the points of `step` and later steps off the event files in `folder`, a run's own.

    A file is written in the order of the steps, so that they are its end. A folder that cannot be written to is told.

    Args:
        folder: of TensorBoard's files.
        step: the first step that is trained now (1-based), or the one before, where a run begins with a point of it.
        samples: consumed after that step; `sample_tokens`: tokens of a sample. For curves over those.
        own: the file that this process writes, which is left alone.
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
    """Where an event file ends without its points from `firsts` on (in steps, samples, tokens).

    None where it has none, and where it cannot be read to its end but for a torn last record.
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
    """The whole records of an event file: where each begins, and the length of what it holds."""
    found, place = [], 0
    while place + AROUND <= len(content):
        (length,) = LENGTH.unpack_from(content, place)
        if place + AROUND + length > len(content):
            break
        found.append((place, length))
        place += AROUND + length
    return found


def first_of(tag: str, firsts: tuple[int, int, int]) -> int:
    """Where the curve of this name begins to be written again, on its own axis."""
    step, samples, tokens = firsts
    if tag.startswith(f"{GROUP}/"):
        return tokens
    return samples if tag.endswith(OF_SAMPLES) else step


def file_of(writer: Any) -> Path | None:
    """The file that a SummaryWriter of torch's writes; None where it does not say."""
    try:
        return Path(writer.file_writer.event_writer._file_name)
    except AttributeError:
        return None
