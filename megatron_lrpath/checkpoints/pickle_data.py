"""Parse a pickle into plain structures: nothing is imported, called, or modified.

Python's unpickler limits the names in a file, not their use: `BUILD` sets attributes of listed classes and
of members of enumerations, which persist even if the file is refused later. Here a name becomes a `Name`,
and a call or a new object a `Record` of the file's content. A table lists the allowed uses of each name.
The caller builds its own objects from these data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import Flag, auto
from typing import Any, ClassVar

MAX_BYTES = 128 * 2**20  # metadata has about 300 bytes per entry, so this is 400,000 entries
MAX_NESTING = 100  # nested collections that are not finished
MAX_INTEGER_BYTES = 32
SCALARS = (str, int, float, bool, type(None))


class NotDataError(ValueError):
    """A pickle with more than data, or a damaged one; the text describes the problem."""


class May(Flag):
    """The allowed uses of a name; without any, a file can only mention it."""

    CALL = auto()
    """Call it with a tuple (REDUCE): a class, an enumeration or a function."""
    NEW = auto()
    """Make an object of the class (NEWOBJ)."""
    FIELDS = auto()
    """Set the fields of a new object of it (BUILD with a dict)."""
    STATE = auto()
    """Set the state of a new object of it, which the class itself takes apart (BUILD with a tuple)."""
    ITEMS = auto()
    """Set items of a new object of it: it is a dict, made without arguments."""


MENTION = May(0)


class Name:
    """A name in the file: `module.name`."""

    __slots__ = ("may", "text")

    def __init__(self, text: str, may: May) -> None:
        self.text, self.may = text, may


class Record:
    """A call or a new object in the file; compared by identity.

    Attributes:
        name: of the called object, `module.name`.
        args: the arguments.
        state: the argument of BUILD; None without it.
        items: the items set by key.
    """

    __slots__ = ("args", "items", "may", "name", "state")

    def __init__(self, name: Name, args: tuple[Any, ...]) -> None:
        self.name, self.may, self.args = name.text, name.may, args
        self.state: dict[str, Any] | tuple[Any, ...] | None = None
        self.items: dict[Any, Any] = {}


class Persistent:
    """A reference to something outside of the pickle (in torch: a tensor's bytes)."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key


def parse(content: bytes, names: Mapping[str, May], persistent: bool = False, limit: int = MAX_BYTES) -> Any:
    """Parse a pickle into dicts, lists, tuples, scalars, `Name`, `Record` and `Persistent`.

    Args:
        content: the pickle, without trailing bytes.
        names: the allowed uses of `module.name`; other names are refused.
        persistent: whether references to something outside of the pickle are allowed.
        limit: the maximum number of bytes.

    Raises:
        NotDataError: it is damaged, too large or too deep, or is not allowed by the table.
    """
    (whole,), rest = parse_sequence(content, 1, names, persistent, limit)
    if rest:
        raise NotDataError("it does not end where its content does")
    return whole


def parse_sequence(
    content: bytes, count: int, names: Mapping[str, May], persistent: bool = False, limit: int = MAX_BYTES
) -> tuple[list[Any], bytes]:
    """Parse `count` consecutive pickles; return them and the bytes after them. Otherwise as `parse`."""
    if len(content) > limit:
        raise NotDataError(f"it has {len(content)} bytes, more than {limit}")
    machine = _Machine(content, names, persistent)
    try:
        found = [machine.run() for _ in range(count)]
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise NotDataError(f"it is damaged ({type(error).__name__} at byte {machine.position})") from None
    return found, content[machine.position :]


class _Machine:
    """The stack, memo and position of one parse; each opcode of the table is a method."""

    def __init__(self, content: bytes, names: Mapping[str, May], persistent: bool) -> None:
        self.content, self.names, self.persistent = content, names, persistent
        self.position = 0
        self.known: dict[str, Name] = {}
        self.stack: list[Any] = []
        self.begun: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute the opcodes up to STOP; the position is then after it."""
        self.stack, self.begun, self.memo = [], [], {}
        content, opcodes = self.content, self.OPCODES
        while (code := content[self.position]) != STOP:
            self.position += 1
            opcode = opcodes[code]
            if opcode is None:
                raise NotDataError(f"it uses opcode {code:#04x}, which has no place in a checkpoint")
            opcode(self)
        self.position += 1
        if len(self.stack) != 1 or self.begun:
            raise NotDataError("it ends before it is whole")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; a length in the file never allocates memory."""
        end = self.position + count
        if count < 0 or end > len(self.content):
            raise NotDataError("it is cut short")
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def number(self, form: struct.Struct) -> Any:
        """Return the next number of a fixed length."""
        value = form.unpack_from(self.content, self.position)[0]
        self.position += form.size
        return value

    # Scalars

    def protocol(self) -> None:
        if not 2 <= self.number(U1) <= 5:
            raise NotDataError("it is of another pickle protocol than 2 to 5")

    def frame(self) -> None:
        if self.number(U8) > len(self.content) - self.position:
            raise NotDataError("it is cut short")

    def none(self) -> None:
        self.stack.append(None)

    def true(self) -> None:
        self.stack.append(True)

    def false(self) -> None:
        self.stack.append(False)

    def byte(self) -> None:
        self.stack.append(self.content[self.position])
        self.position += 1

    def short(self) -> None:
        self.stack.append(self.number(U2))

    def integer(self) -> None:
        self.stack.append(self.number(I4))

    def floating(self) -> None:
        self.stack.append(self.number(F8))

    def long(self) -> None:
        count = self.number(U1)
        if count > MAX_INTEGER_BYTES:
            raise NotDataError(f"it holds a number of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def text1(self) -> None:
        self.stack.append(self.take(self.number(U1)).decode())

    def text4(self) -> None:
        self.stack.append(self.take(self.number(U4)).decode())

    def bytes1(self) -> None:
        self.stack.append(self.take(self.number(U1)))

    def bytes4(self) -> None:
        self.stack.append(self.take(self.number(U4)))

    # Collections

    def mark(self) -> None:
        if len(self.begun) >= MAX_NESTING:
            raise NotDataError(f"it is nested more than {MAX_NESTING} deep")
        self.begun.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.begun.pop()
        return items

    def empty_tuple(self) -> None:
        self.stack.append(())

    def tuple1(self) -> None:
        self.stack[-1] = (self.stack[-1],)

    def tuple2(self) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def tuple3(self) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def tuple_marked(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def empty_list(self) -> None:
        self.stack.append([])

    def append(self) -> None:
        value = self.stack.pop()
        self.top_list().append(value)

    def appends(self) -> None:
        items = self.since_mark()
        self.top_list().extend(items)

    def top_list(self) -> list[Any]:
        """Return the list on top of the stack."""
        top = self.stack[-1]
        if type(top) is not list:
            raise NotDataError("it appends to something that is no list")
        return top

    def empty_dict(self) -> None:
        self.stack.append({})

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def set_items(self) -> None:
        self.set_pairs(self.since_mark())

    def set_pairs(self, items: list[Any]) -> None:
        """Set alternating keys and values in the dict on top of the stack."""
        top = self.stack[-1]
        if type(top) is Record and top.may & May.ITEMS and not top.args:
            top = top.items
        if type(top) is not dict or len(items) % 2:
            raise NotDataError("it sets items of something that is no dict")
        for place in range(0, len(items), 2):
            key = items[place]
            if type(key) is not str and not is_key(key):
                raise NotDataError("it has a key that is neither text nor a number")
            top[key] = items[place + 1]

    # Memo

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put1(self) -> None:
        self.memo[self.number(U1)] = self.stack[-1]

    def put4(self) -> None:
        self.memo[self.number(U4)] = self.stack[-1]

    def get1(self) -> None:
        self.stack.append(self.memo[self.number(U1)])

    def get4(self) -> None:
        self.stack.append(self.memo[self.number(U4)])

    # Names, calls, objects

    def named(self, module: str, name: str) -> None:
        """Push a name in the table."""
        text = f"{module}.{name}"
        if text not in self.known:
            if text not in self.names:
                raise NotDataError(f"it names {text[:200]}, which has no place in a checkpoint")
            self.known[text] = Name(text, self.names[text])
        self.stack.append(self.known[text])

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise NotDataError("it names something by other than text")
        self.named(module, name)

    def line_global(self) -> None:
        module, name = self.line(), self.line()
        # Protocols before 3 use Python 2's name of the builtins.
        self.named("builtins" if module == "__builtin__" else module, name)

    def line(self) -> str:
        """Return the text up to the next end of line."""
        end = self.content.find(b"\n", self.position, self.position + 500)
        if end < 0:
            raise NotDataError("it is cut short")
        text = self.content[self.position : end].decode()
        self.position = end + 1
        return text

    def reduce(self) -> None:
        self.record(May.CALL, "calls")

    def new_object(self) -> None:
        self.record(May.NEW, "makes an object of")

    def record(self, needed: May, does: str) -> None:
        """Push a record of the name and the tuple on the stack."""
        args, name = self.stack.pop(), self.stack[-1]
        if type(name) is not Name or type(args) is not tuple:
            raise NotDataError(f"it {does} something that is no name of a class")
        if not name.may & needed:
            raise NotDataError(f"it {does} {name.text}, which has no place in a checkpoint")
        self.stack[-1] = Record(name, args)

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is not Record or made.state is not None:
            raise NotDataError("it changes something that is no fresh object of a data class")
        fields = type(state) is dict and May.FIELDS in made.may and all(type(key) is str for key in state)
        if not fields and not (type(state) is tuple and May.STATE in made.may):
            raise NotDataError(f"it changes {made.name} in a way that has no place in a checkpoint")
        made.state = state

    def beside(self) -> None:
        if not self.persistent:
            raise NotDataError("it refers to something outside of it")
        self.stack[-1] = Persistent(self.stack[-1])

    OPCODES: ClassVar[list[Callable[[_Machine], None] | None]] = [None] * 256


def is_key(key: Any) -> bool:
    """Return whether a dict can have the key: a scalar, a record, or a tuple of scalars (which are cheap to
    hash).
    """
    if type(key) is tuple:
        return len(key) <= 16 and all(type(part) in SCALARS for part in key)
    return type(key) in (*SCALARS, Record)


U1, U2, U4, U8 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
I4, F8 = struct.Struct("<i"), struct.Struct(">d")
STOP = ord(".")
_TABLE: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol, b"\x95": _Machine.frame, b"N": _Machine.none, b"\x88": _Machine.true,
    b"\x89": _Machine.false, b"K": _Machine.byte, b"M": _Machine.short, b"J": _Machine.integer,
    b"G": _Machine.floating, b"\x8a": _Machine.long, b"\x8c": _Machine.text1, b"X": _Machine.text4,
    b"C": _Machine.bytes1, b"B": _Machine.bytes4, b"(": _Machine.mark, b")": _Machine.empty_tuple,
    b"\x85": _Machine.tuple1, b"\x86": _Machine.tuple2, b"\x87": _Machine.tuple3, b"t": _Machine.tuple_marked,
    b"]": _Machine.empty_list, b"a": _Machine.append, b"e": _Machine.appends, b"}": _Machine.empty_dict,
    b"s": _Machine.set_item, b"u": _Machine.set_items, b"\x94": _Machine.memoize, b"q": _Machine.put1,
    b"r": _Machine.put4, b"h": _Machine.get1, b"j": _Machine.get4, b"\x93": _Machine.stack_global,
    b"c": _Machine.line_global, b"R": _Machine.reduce, b"\x81": _Machine.new_object, b"b": _Machine.build,
    b"Q": _Machine.beside,
}  # fmt: skip
for _code, _opcode in _TABLE.items():
    _Machine.OPCODES[_code[0]] = _opcode
