"""Pickles read as data: damaged and hostile files are refused, and a refused file changes nothing."""

from __future__ import annotations

import pathlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as theirs
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_lrpath.checkpoints import pickle_data
from megatron_lrpath.checkpoints.metadata import load_metadata
from megatron_lrpath.checkpoints.pickle_data import May, NotDataError, parse
from megatron_lrpath.errors import UserError

CHUNK = theirs.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
INDEX = theirs.MetadataIndex("a", torch.Size([0, 0]))


def whole(**changes: Any) -> theirs.Metadata:
    """Return metadata of a tensor and an object."""
    fields: dict[str, Any] = {
        "state_dict_metadata": {
            "a": theirs.TensorStorageMetadata(
                theirs.TensorProperties(torch.bfloat16), torch.Size([2, 3]), [CHUNK]
            ),
            "b": theirs.BytesStorageMetadata(),
        },
        "planner_data": {"a": ("a",), "b": ("b", 1)},
        "storage_data": {INDEX: _StorageInfo("__0_0.distcp", 0, 12)},
        "storage_meta": theirs.StorageMeta(Path("somewhere"), save_id="x"),
    }
    return theirs.Metadata(**{**fields, **changes})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_are_what_torch_makes_of_them(protocol: int) -> None:
    content = pickle.dumps(whole(), protocol=protocol)
    assert load_metadata(content, Path("x")) == theirs.Metadata(
        **{**vars(whole()), "storage_meta": theirs.StorageMeta(save_id="x")}
    )


def with_field(name: str, value: Any) -> bytes:
    """Return metadata with an additional field."""
    metadata = whole()
    setattr(metadata, name, value)
    return pickle.dumps(metadata)


def place(**changes: Any) -> bytes:
    """Return metadata with another location of the stored tensor."""
    return pickle.dumps(
        whole(
            storage_data={
                INDEX: _StorageInfo(**{"relative_path": "__0_0.distcp", "offset": 0, "length": 1, **changes})
            }
        )
    )


def piece(offsets: list[int], sizes: list[int]) -> bytes:
    """Return metadata with another piece of a tensor of 2 × 3."""
    chunk = theirs.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    tensor = theirs.TensorStorageMetadata(theirs.TensorProperties(torch.float32), torch.Size([2, 3]), [chunk])
    return pickle.dumps(whole(state_dict_metadata={"a": tensor}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (with_field("unknown", 1), "unknown fields"),
        (place(relative_path="../x"), "outside the checkpoint"),
        (place(relative_path="/etc/x"), "outside the checkpoint"),
        (place(offset=-1), "where a size belongs"),
        (place(length=2**63), "where a size belongs"),
        (place(length=True), "where int belongs"),
        (place(transform_descriptors=["stream.zstd"]), "compressed"),
        (piece([1, 0], [2, 3]), "outside it"),
        (piece([0], [2]), "outside it"),
        (pickle.dumps(whole(state_dict_metadata={1: CHUNK})), "where str belongs"),
        (pickle.dumps(whole(state_dict_metadata={"a": CHUNK})), "where TensorStorageMetadata belongs"),
        (
            pickle.dumps(
                whole(
                    state_dict_metadata={
                        "x._extra_state/shard_0_1": whole().state_dict_metadata["a"],
                    }
                )
            ),
            "is no object",
        ),
        (pickle.dumps([1]), "holds list"),
        (pickle.dumps(whole())[:-40], "damaged|cut short"),
        (pickle.dumps(whole()) + b"x", "does not end"),
    ],
)
def test_metadata_of_another_form_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_metadata(content, Path("x"))


NAMES = {"m.Data": May.NEW | May.FIELDS, "m.member": May.CALL, "m.Mention": May(0)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x04cos\nsystem\n.", "os.system, which has no place"),
        (b"\x80\x04cm\nData\n}b.", "no fresh object"),  # of the class itself
        (b"\x80\x04cm\nData\n)\x81N}U\x01ab.", "opcode"),
        (b"\x80\x04cm\nData\n)\x81N}\x86b.", "in a way"),  # the slots' form: attributes by setattr
        (b"\x80\x04cm\nData\n)\x81}b}b.", "no fresh object"),
        (b"\x80\x04cm\nmember\nK\x01\x85R}b.", "in a way"),
        (b"\x80\x04cm\nMention\n)R.", "calls m.Mention"),
        (b"\x80\x04cm\nData\n)R.", "calls m.Data"),
        (b"\x80\x04cm\nmember\n)\x81.", "makes an object of m.member"),
        (b"\x80\x04cm\nmember\n)R)R.", "no name"),
        (b"\x80\x04K\x01Q.", "outside of it"),
        (b"\x80\x04(im\nData\n.", "opcode"),
        (b"\x80\x04\x82\x01.", "opcode"),
        (b"\x80\x04N2.", "opcode"),
        (b"\x80\x04\x8a\xff" + bytes(255) + b".", "a number of 255 bytes"),
        (b"\x80\x04X\xff\xff\xff\x7f.", "cut short"),
        (b"\x80\x04B\xff\xff\xff\xffx.", "cut short"),
        (b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".", "opcode"),
        (b"\x80\x04" + b"(" * 200 + b".", "nested"),
        (b"\x80\x04h\x05.", "damaged"),
        (b"\x80\x04}}K\x01s.", "neither text"),
        (b"\x80\x01N.", "protocol"),
        (b"\x80\x04\x8c\x03\xed\xa0\x80.", "damaged"),  # a lone surrogate
        (b"", "damaged"),
    ],
)
def test_what_is_more_than_data_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(NotDataError, match=said):
        parse(content, NAMES)


def test_a_bomb_of_references_takes_no_time() -> None:
    doubled = b"N" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(100)) + b"q\xff0"
    content = b"\x80\x04" + doubled[:-1] + b"."
    assert type(parse(content, {})) is tuple
    with pytest.raises(NotDataError, match="neither text"):  # hashing one takes 2^100 steps
        parse(b"\x80\x04}" + doubled[:-3] + b"Ns.", {})


def test_a_file_may_not_be_larger_than_the_limit() -> None:
    with pytest.raises(NotDataError, match="more than 10"):
        parse(pickle.dumps("x" * 20), {}, limit=10)


class Build:
    """The payload of vulnerability X2: BUILD on a name that the table has."""

    def __init__(self, target: object) -> None:
        self.target = target

    def content(self, attribute: str) -> bytes:
        """Return `BUILD` with a state of `(None, {attribute: value})`, then complete metadata."""
        module, name = self.target.__module__, self.target.__name__  # type: ignore[attr-defined]
        text = b"\x8c" + bytes([len(attribute)]) + attribute.encode()
        change = b"c%s\n%s\nN}%sK\x01s\x86b" % (module.encode(), name.encode(), text)
        body = pickle.dumps(whole())
        return b"\x80\x04(" + change + b"1" + body[2:]


@pytest.mark.parametrize(
    "target",
    [theirs.Metadata, theirs.MetadataIndex, pathlib.PosixPath, torch.serialization._get_layout],
    ids=lambda target: target.__name__,
)
def test_build_changes_neither_classes_nor_functions(target: Any) -> None:
    before = dict(vars(target))
    with pytest.raises(UserError, match="not a checkpoint's metadata"):
        load_metadata(Build(target).content("parent"), Path("x"))
    assert dict(vars(target)) == before


@pytest.mark.parametrize("read", [pickle_data.parse])
def test_nothing_is_imported(read: Callable[..., Any]) -> None:
    import sys

    before = set(sys.modules)
    with pytest.raises(NotDataError):
        read(b"\x80\x04cantigravity\nfly_by\n.", {})
    read(b"\x80\x04cantigravity\nfly_by\n.", {"antigravity.fly_by": May(0)})
    assert set(sys.modules) == before
