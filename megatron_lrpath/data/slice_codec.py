"""The bytes of a slice file: a checked header in JSON and document numbers packed to about half a byte each.

    8 bytes   magic `LRPSLICE`
    u32       format version (1), little-endian like all that follows
    u64       length of the header
    32 bytes  SHA-256 of everything after this field
    header    UTF-8 JSON, an object; `blocks` of each of its `sources` lists [documents, bytes] of every block
    blocks    the sources' blocks one after another

A block holds up to 2**20 document numbers, sorted, as gaps (number minus the one before it minus 1, the first
counted from -1 and each block continuing from the last), as u32 split into four planes (all low bytes first),
compressed with zlib. A gap cannot be negative, so a decoded list is strictly ascending by construction.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.reading import parse_json

type Documents = np.ndarray[tuple[int], np.dtype[np.int32]]

MAGIC = b"LRPSLICE"
FORMAT = 1
PREAMBLE = struct.Struct("<8sIQ32s")
BLOCK = 1 << 20
LIMIT = 2**31  # document numbers are Megatron's int32


class DamagedError(ValueError):
    """The bytes are not a complete slice file of this format; the message gives the problem."""


def pack_documents(documents: Documents) -> list[tuple[int, bytes]]:
    """Return blocks (number of documents, bytes) of strictly ascending document numbers."""
    blocks = []
    before = -1
    for start in range(0, len(documents), BLOCK):
        part = documents[start : start + BLOCK].astype(np.int64)
        gaps = np.diff(part, prepend=before) - 1
        if gaps.min() < 0 or part[-1] >= LIMIT:
            raise ValueError("document numbers must be ascending, without repetition and below 2**31")
        planes = np.ascontiguousarray(gaps.astype("<u4").view(np.uint8).reshape(-1, 4).T)
        blocks.append((len(part), zlib.compress(planes.tobytes(), 3)))
        before = int(part[-1])
    return blocks


def unpack_documents(blocks: list[tuple[int, bytes]]) -> Documents:
    """Return the document numbers (sorted int32) of packed blocks. Memory depends on the blocks' real
    content.

    Raises:
        DamagedError: a block does not match its header.
    """
    parts = []
    before = -1
    for count, data in blocks:
        if not 0 < count <= BLOCK:
            raise DamagedError(f"a block of {count} documents")
        unpacker = zlib.decompressobj()
        try:
            raw = unpacker.decompress(data, 4 * count + 1)
        except zlib.error as error:
            raise DamagedError(f"a block cannot be unpacked ({error})") from None
        if len(raw) != 4 * count or not unpacker.eof or unpacker.unused_data:
            raise DamagedError("a block does not have the number of documents in its header")
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(4, count)
        gaps = np.ascontiguousarray(planes.T).view("<u4").reshape(-1)
        part = np.cumsum(gaps + np.int64(1)) + before
        before = int(part[-1])
        if before >= LIMIT:
            raise DamagedError("a document number beyond 2**31")
        parts.append(part.astype(np.int32))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def encode(header: dict[str, Any], sources: list[Documents]) -> bytes:
    """Return a complete slice file; `header["sources"]` has one object for each list of documents."""
    packed = [pack_documents(documents) for documents in sources]
    described = [
        {**source, "blocks": [[count, len(data)] for count, data in blocks]}
        for source, blocks in zip(header["sources"], packed, strict=True)
    ]
    text = json.dumps({**header, "sources": described}, ensure_ascii=False, sort_keys=True).encode("utf-8")
    body = b"".join([text, *(data for blocks in packed for _, data in blocks)])
    return PREAMBLE.pack(MAGIC, FORMAT, len(text), hashlib.sha256(body).digest()) + body


def read_slice_bytes(path: Path) -> bytes:
    """Return the file's bytes, or only its beginning if it is not a slice file: a file of terabytes is not
    read.
    """
    with path.open("rb") as stream:
        head = stream.read(PREAMBLE.size)
        return head + stream.read() if head.startswith(MAGIC) else head


def read_slice_header(path: Path) -> dict[str, Any]:
    """Return only the header of a slice file, quickly: its checksum is not compared.

    Raises:
        DamagedError, ValueError, OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(PREAMBLE.size)
        if len(head) < PREAMBLE.size or not head.startswith(MAGIC):
            raise DamagedError("it does not begin like one")
        length = PREAMBLE.unpack(head)[2]
        header = parse_json(stream.read(min(length, path.stat().st_size)))
    if not isinstance(header, dict):
        raise DamagedError("its header is no object")
    return header


def decode(data: bytes) -> tuple[dict[str, Any], list[Documents]]:
    """Return the header and each source's documents of a complete slice file.

    Raises:
        DamagedError: foreign, of another format version, truncated, or changed.
    """
    if len(data) < PREAMBLE.size or not data.startswith(MAGIC):
        raise DamagedError("it does not begin like one")
    _, version, length, checksum = PREAMBLE.unpack_from(data)
    if version != FORMAT:
        raise DamagedError(f"it is of format {version}, and this version of the program reads {FORMAT}")
    body = memoryview(data)[PREAMBLE.size :]
    if length > len(body) or hashlib.sha256(body).digest() != checksum:
        raise DamagedError("its content does not match its checksum: truncated or changed")
    try:
        header = parse_json(bytes(body[:length]))
        lists = [[(int(n), int(size)) for n, size in source["blocks"]] for source in header["sources"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"its header cannot be read ({error!r})") from None
    payload = body[length:]
    sizes = [size for blocks in lists for _, size in blocks]
    if any(size < 0 for size in sizes) or sum(sizes) != len(payload):
        raise DamagedError("the sizes in its header do not add up")
    stream = BytesIO(payload)
    return header, [
        unpack_documents([(count, stream.read(size)) for count, size in blocks]) for blocks in lists
    ]
