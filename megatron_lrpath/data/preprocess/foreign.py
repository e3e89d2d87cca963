"""Detect files that are not JSON lines by their first bytes, with what to do for each."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lrpath.errors import UserError

UNPACK = "unpack it on the way: {} {{name}} | … --input -"
CONVERT = "convert it to JSON lines or Parquet"
RECODE = "recode it: iconv -f {} -t UTF-8 {{name}} | … --input -"
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "packed with bzip2", UNPACK.format("bzip2 -dc")),
    (b"\xfd7zXZ\x00", "packed with xz", UNPACK.format("xz -dc")),
    (b"\x04\x22\x4d\x18", "packed with lz4", UNPACK.format("lz4 -dc")),
    (b"\xff\x06\x00\x00sNaPpY", "packed with snappy", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", UNPACK.format("unzip -p")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK.format("7z x -so")),
    (b"\x1f\x8b", "packed twice", "unpack it once"),
    (b"\x28\xb5\x2f\xfd", "packed twice", "unpack it once"),
    (b"PAR1", "Parquet, packed once more", "unpack it first: Parquet is read as it is"),
    (b"ARROW1", "an Arrow file", CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream", CONVERT),
    (b"FEA1", "a Feather file", CONVERT),
    (b"ORC", "an ORC file", CONVERT),
    (b"Obj\x01", "an Avro file", CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", CONVERT),
    (b"\x89HDF", "an HDF5 file", CONVERT),
    (b"%PDF", "a PDF document", CONVERT),
    (b"\xff\xfe\x00\x00", "UTF-32 text", RECODE.format("UTF-32")),
    (b"\x00\x00\xfe\xff", "UTF-32 text", RECODE.format("UTF-32")),
    (b"\xff\xfe", "UTF-16 text", RECODE.format("UTF-16")),
    (b"\xfe\xff", "UTF-16 text", RECODE.format("UTF-16")),
    (b"{\x00", "UTF-16 text", RECODE.format("UTF-16LE")),
    (b"\x00{", "UTF-16 text", RECODE.format("UTF-16BE")),
)
NONE_USABLE = (
    'A line must be a JSON object with the text of a document under the key "text" (--json-keys names another key). '
    "`lrpath docs data` shows how to convert plain text"
)
TAR_MAGIC, TAR_PLACE = b"ustar", 257
UTF8_BOM = b"\xef\xbb\xbf"


def refuse_foreign(name: str, beginning: bytes) -> None:
    """Raise an error if the first bytes of an unpacked file are not JSON lines.

    Raises:
        UserError: the kind of the file, and what to do.
    """
    kind = kind_of(beginning)
    if kind is not None:
        what, advice = kind
        raise UserError(f"{name}: is {what}, where JSON lines are read; {advice.format(name=name)}")


def kind_of(beginning: bytes) -> tuple[str, str] | None:
    """Return the kind of a file that is not JSON lines, and what to do with it."""
    for magic, what, advice in FORMATS:
        if beginning.startswith(magic):
            return what, advice
    if beginning[TAR_PLACE : TAR_PLACE + len(TAR_MAGIC)] == TAR_MAGIC:
        return "a tar archive", UNPACK.format("tar -xOf")
    if beginning.removeprefix(UTF8_BOM).lstrip()[:1] == b"[":
        return "a JSON array", "take it apart: jq -c '.[]' {name} | … --input -"
    return None


def none_usable(names: Sequence[str], first: str) -> str:
    """Return the message about inputs in which no document is usable; `first` is the first rejected one."""
    return f"no usable documents in {', '.join(names)}" + (
        f"; the first is\n  {first}\n{NONE_USABLE}" if first else ""
    )
