"""Read the page headers of a Parquet file, to bound the memory that a reader will need before it unpacks.

Parquet's readers unpack a whole page, regardless of its header (2 GiB at most). The footer, which has sizes,
too, is from the same writer and not compared with anything. A header is a Thrift structure in the compact
protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

PAGE_BYTES = 1 << 29  # maximum size of an unpacked page
HEADER_BYTES = 1 << 12, 1 << 24  # read at first, and at most: the latter is pyarrow's own limit
DICTIONARY = 2  # the type of a dictionary page
_DEPTH = 16  # maximum depth of nested structures
_TYPE, _UNPACKED, _PACKED = 1, 2, 3  # the first fields of a header


class PageError(ValueError):
    """The pages of a file cannot be read, or a page is too large; the text is the reason."""


@dataclass(frozen=True)
class Page:
    """A page: its type, and its size in bytes when unpacked and in the file."""

    kind: int
    unpacked: int
    packed: int


def longest_dictionary(metadata: Any, raw: BinaryIO, columns: Collection[str]) -> int:
    """Return the bytes of the longest dictionary of some columns, 0 without one: a value can be as long.

    Args:
        metadata: pyarrow's metadata of the file that is open as `raw`.
        columns: top-level names.

    Raises:
        PageError: a page of these columns is longer than `PAGE_BYTES`, or is not a page.
    """
    longest = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            path = column.path_in_schema
            if not any(path == name or path.startswith(f"{name}.") for name in columns):
                continue
            for page in pages(raw, _begin(column), column.total_compressed_size):
                if page.unpacked > PAGE_BYTES:
                    raise PageError(
                        f"row group {group + 1} has a page of {page.unpacked:,} bytes in the column "
                        f"{path}, which are unpacked at once; {PAGE_BYTES:,} are the most. Write the "
                        "file again with smaller pages, for example with pyarrow: "
                        "write_table(…, row_group_size=100, write_batch_size=10)"
                    )
                if page.kind == DICTIONARY:
                    longest = max(longest, page.unpacked)
    return longest


def _begin(column: Any) -> int:
    """Return the offset of a column's first page, by pyarrow's rule."""
    data, dictionary = int(column.data_page_offset), column.dictionary_page_offset
    return int(dictionary) if dictionary and 0 < dictionary < data else data


def pages(raw: BinaryIO, begin: int, length: int) -> Iterator[Page]:
    """Yield the pages of a column in a file, which has `length` bytes from `begin` on.

    Raises:
        PageError: the bytes are not page headers.
    """
    end = begin + length
    while begin < end:
        page, header = _page(raw, begin)
        yield page
        begin += header + page.packed


def _page(raw: BinaryIO, begin: int) -> tuple[Page, int]:
    """Return the page at `begin`, and the number of bytes of its header."""
    for size in HEADER_BYTES:
        raw.seek(begin)
        content = raw.read(size)
        try:
            header = _Compact(content)
            fields = header.structure()
        except IndexError:  # longer than the bytes read
            continue
        sizes = [fields.get(name) for name in (_TYPE, _UNPACKED, _PACKED)]
        if any(type(one) is not int or not 0 <= one < 2**31 for one in sizes):
            raise PageError(f"there is no page at byte {begin:,}")
        return Page(*sizes), header.position  # type: ignore[arg-type]
    raise PageError(f"there is no page at byte {begin:,}")


class _Compact:
    """Parser of a Thrift structure; keeps only numbers. Raises IndexError if the content ends early."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0
        number = self._number
        self._values: dict[int, Callable[[int], Any]] = {
            1: lambda depth: True,
            2: lambda depth: False,
            3: lambda depth: self._skip(1),
            4: lambda depth: number(),
            5: lambda depth: number(),
            6: lambda depth: number(),
            7: lambda depth: self._skip(8),
            8: lambda depth: self._skip(self._varint()),
            9: self._list,
            10: self._list,
            11: self._map,
            12: self.structure,
        }

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a structure by their number."""
        if depth > _DEPTH:
            raise PageError("a page's header is nested too deep")
        found: dict[int, Any] = {}
        name = 0
        while kind := self._byte():
            name = name + (kind >> 4) if kind >> 4 else self._number()
            found[name] = self._value(kind & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind not in self._values:
            raise PageError("a page's header is damaged")
        return self._values[kind](depth + 1)

    def _byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.content):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise PageError("a page's header is damaged")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _list(self, depth: int) -> None:
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        self._elements(count, (head & 15,), depth)

    def _map(self, depth: int) -> None:
        if count := self._varint():
            head = self._byte()
            self._elements(count, (head >> 4, head & 15), depth)

    def _elements(self, count: int, kinds: tuple[int, ...], depth: int) -> None:
        if count > len(self.content):
            raise PageError("a page's header is damaged")
        for _ in range(count):
            for kind in kinds:
                if kind in (1, 2):  # a boolean: in a list a byte, in a field a part of its header
                    self._skip(1)
                else:
                    self._value(kind, depth)
