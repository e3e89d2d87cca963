"""Read many hostile pickles through the door to a checkpoint, and look for an effect of any of them.

    .venv/bin/python scripts/fuzz_checkpoints.py [--inputs 20000] [--seed 1]

A grammar makes the pickles: all opcodes, on all names that a reader accepts and some that an attacker would use, half
of them inside whole metadata. Each is read as `.metadata`, as an object, as a tensor and as an `_extra_state`. Before
and after, the interpreter is compared: the attributes of every listed class, function and enumeration, modules,
environment, files, and what Python's audit events report of processes, imports, sockets and writes. Prints a line, and
the inputs that had an effect; status 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import importlib
import io
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from megatron_lrpath.checkpoints import extra_state, objects
from megatron_lrpath.checkpoints.metadata import METADATA_NAMES, load_metadata
from megatron_lrpath.checkpoints.pickle_data import May, NotDataError
from megatron_lrpath.errors import UserError

STRANGERS = (
    "os.system",
    "builtins.exec",
    "builtins.eval",
    "builtins.getattr",
    "builtins.setattr",
    "builtins.__import__",
    "builtins.open",
    "subprocess.Popen",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.Path.parent",
    "copyreg.__newobj__",
    "torch.storage._load_from_bytes",
    "torch.hub.load",
    "torch.load",
    "pickle.loads",
    "signal.signal",
    "megatron_lrpath.runs.lineage.git_commit",
    "collections.Counter",
    "functools.partial",
    "types.FunctionType",
)
ATTRIBUTES = (
    "parent",
    "__init__",
    "__setstate__",
    "__class__",
    "__reduce__",
    "__getattr__",
    "_value_",
    "cache",
    "fqn",
    "offset",
    "__dict__",
    "relative_path",
    "__code__",
    "state_dict_metadata",
    "x",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "import",
    "exec",
    "compile",
    "signal.",
    "open",
    "pickle.find_class",
    "object.__setattr__",
    "code.__new__",
    "function.__new__",
)


def known_names() -> list[str]:
    """Return all names that a reader accepts."""
    return sorted({*METADATA_NAMES, *objects.object_names(), *extra_state.NAMES, *extra_state.STORAGE_NAMES})


class Grammar:
    """Random pickles: each method returns opcodes that leave one more value on the stack."""

    def __init__(self, rng: random.Random, metadata: bytes) -> None:
        self.rng, self.metadata = rng, metadata
        self.names = known_names()
        self.memo = 0
        self.mild = False
        self.tables = [METADATA_NAMES, objects.object_names(), extra_state.NAMES]
        self.table: Mapping[str, May] = METADATA_NAMES

    def content(self) -> bytes:
        """Return a whole pickle; half of them use accepted names only, to get further into the reader."""
        self.memo, self.mild, self.table = 0, self.rng.random() < 0.5, self.rng.choice(self.tables)
        body = self.value(self.rng.randint(1, 5))
        shape = self.rng.random()
        if shape < 0.2:
            return b"\x80\x04" + body + b"."
        if shape < 0.3:  # the previous value is dropped
            return b"\x80\x04" + body + b"0" + self.value(2) + b"."
        if shape < 0.5:  # a piece of real metadata is replaced
            place = self.rng.randrange(2, len(self.metadata))
            return (
                self.metadata[:place] + body + self.metadata[self.rng.randrange(place, len(self.metadata)) :]
            )
        field = self.rng.choice(
            ["all_local_plans", "mcore_data", "planner_data", "storage_meta", "version", "x"]
        )
        inner = self.text("state_dict_metadata") + b"}" + self.text("storage_data") + b"}"
        made = self.name("torch.distributed.checkpoint.metadata.Metadata") + b")\x81"
        return b"\x80\x04" + made + b"}(" + inner + self.text(field) + body + b"ub."

    def value(self, depth: int) -> bytes:
        """Return any value."""
        makers: list[Callable[[int], bytes]] = [self.scalar, self.recalled]
        if depth > 0:
            often = [self.scalar, self.collection] if self.mild else [self.odd, self.called, self.built]
            makers += [self.collection, self.called, self.built, *often]
        made = self.rng.choice(makers)(depth)
        if self.rng.random() < 0.3:
            made += self.put()
        return made

    def put(self) -> bytes:
        """Return opcodes that store the top of the stack in the memo."""
        number, self.memo = self.memo, self.memo + 1
        ways = [b"q" + bytes([number % 256]), b"r" + struct.pack("<I", number), b"p%d\n" % number, b"\x94"]
        return self.rng.choice(ways[:2] if self.mild else ways)

    def recalled(self, depth: int) -> bytes:
        """Return a value from the memo."""
        if not self.memo:
            return self.any_name()
        number = self.rng.randrange(self.memo)
        ways = [b"h" + bytes([number % 256]), b"j" + struct.pack("<I", number), b"g%d\n" % number]
        return self.rng.choice(ways[:2] if self.mild else ways)

    def scalar(self, depth: int) -> bytes:
        """Return a number, text, bytes or a name."""
        number = self.rng.choice([0, 1, 2, 255, 2**31 - 1])
        text = self.rng.choice([*ATTRIBUTES, "touch effect", "__0_0.distcp", "../x", "é"]).encode()
        if self.mild:
            return self.rng.choice(
                [b"N", b"\x88", b"K\x01", b"G" + bytes(8), self.text(text.decode()), self.any_name()]
            )
        long = number.to_bytes(8, "little")
        return self.rng.choice(
            [
                lambda: b"N",
                lambda: b"\x88",
                lambda: b"\x89",
                lambda: b"I%d\n" % number,
                lambda: b"K" + bytes([number % 256]),
                lambda: b"M" + struct.pack("<H", number % 65536),
                lambda: b"J" + struct.pack("<i", number),
                lambda: b"L%dL\n" % number,
                lambda: b"\x8a\x08" + long,
                lambda: b"\x8b\x08\0\0\0" + long,
                lambda: b"F1.5\n",
                lambda: b"G" + struct.pack(">d", 1.5),
                lambda: b"S'" + text.replace(b"\xc3\xa9", b"e") + b"'\n",
                lambda: b"T" + struct.pack("<i", len(text)) + text,
                lambda: b"U" + bytes([len(text)]) + text,
                lambda: b"V" + text + b"\n",
                lambda: self.text(text.decode()),
                lambda: b"X" + struct.pack("<I", len(text)) + text,
                lambda: b"\x8d" + struct.pack("<Q", len(text)) + text,
                lambda: b"C" + bytes([len(text)]) + text,
                lambda: b"B" + struct.pack("<I", len(text)) + text,
                lambda: b"\x8e" + struct.pack("<Q", len(text)) + text,
                lambda: b"\x96" + struct.pack("<Q", len(text)) + text,
                lambda: self.any_name(),
                lambda: self.any_name(),
            ]
        )()

    def text(self, value: str) -> bytes:
        """Return a text."""
        raw = value.encode()
        return (
            b"\x8c" + bytes([len(raw)]) + raw if len(raw) < 256 else b"X" + struct.pack("<I", len(raw)) + raw
        )

    def any_name(self) -> bytes:
        """Return a name that readers accept, or a name that an attacker would use."""
        if self.mild:
            return self.allowed(May(0))
        return self.name(self.rng.choice(self.names if self.rng.random() < 0.75 else STRANGERS))

    def allowed(self, may: May) -> bytes:
        """Return a name for which the reader's table allows `may`."""
        return self.name(self.rng.choice([name for name, allowed in self.table.items() if may in allowed]))

    def name(self, name: str) -> bytes:
        """Return a name, split in one of two ways."""
        module, _, last = name.rpartition(".")
        if self.rng.random() < 0.5:
            return b"c" + module.encode() + b"\n" + last.encode() + b"\n"
        return self.text(module) + self.text(last) + b"\x93"

    def collection(self, depth: int) -> bytes:
        """Return a list, tuple, dict or set."""
        one, two = self.value(depth - 1), self.value(depth - 1)
        key = self.text(self.rng.choice(ATTRIBUTES))
        if self.mild:
            return self.rng.choice([b"](" + one + two + b"e", one + two + b"\x86", b"}(" + key + one + b"u"])
        return self.rng.choice(
            [
                b"]" + one + b"a",
                b"](" + one + two + b"e",
                b"(" + one + two + b"l",
                b")",
                one + b"\x85",
                one + two + b"\x86",
                one + two + one + b"\x87",
                b"(" + one + two + b"t",
                b"}" + key + one + b"s",
                b"}(" + key + one + b"u",
                b"(" + key + one + b"d",
                b"}" + one + two + b"s",
                b"\x8f(" + one + b"\x90",
                b"(" + one + b"\x91",
            ]
        )

    def arguments(self, depth: int) -> bytes:
        """Return a tuple of arguments."""
        one = self.value(depth - 1)
        return self.rng.choice(
            [b")", one + b"\x85", self.text("touch effect") + b"\x85", b"K\x01\x85", b"K\x0f\x85"]
        )

    def called(self, depth: int) -> bytes:
        """Return a call or a new object."""
        name = self.any_name() if self.rng.random() < 0.9 else self.value(depth - 1)
        arguments = self.arguments(depth)
        if self.mild:
            if self.rng.random() < 0.5:
                return self.allowed(May.CALL) + arguments + b"R"
            return self.allowed(May.NEW) + self.rng.choice([b")", arguments]) + b"\x81"
        module, _, last = self.rng.choice([*self.names, *STRANGERS]).rpartition(".")
        line = module.encode() + b"\n" + last.encode() + b"\n"
        return self.rng.choice(
            [
                name + arguments + b"R",
                name + arguments + b"\x81",
                name + arguments + b"}\x92",
                b"(" + self.value(depth - 1) + b"i" + line,
                b"(" + name + self.value(depth - 1) + b"o",
            ]
        )

    def built(self, depth: int) -> bytes:
        """Return BUILD, items or elements on a name, an object, a member or a value from the memo."""
        target = self.rng.choice([self.any_name, lambda: self.called(depth), lambda: self.recalled(depth)])()
        key = self.text(self.rng.choice(ATTRIBUTES))
        state = b"}" + key + self.value(depth - 1) + b"s"
        if self.mild:
            fresh = self.allowed(May.FIELDS) + b")\x81" if self.rng.random() < 0.8 else target
            return (
                fresh
                + self.rng.choice([state, state, state, self.arguments(depth), b"N" + state + b"\x86"])
                + b"b"
            )
        return target + self.rng.choice(
            [
                state + b"b",
                b"N" + state + b"\x86b",
                state + state + b"\x86b",
                self.value(depth - 1) + b"b",
                key + self.value(depth - 1) + b"s",
                self.value(depth - 1) + b"a",
                b"(" + self.value(depth - 1) + b"\x90",
            ]
        )

    def odd(self, depth: int) -> bytes:
        """Return opcodes that pickles of data do not use."""
        return self.rng.choice(
            [
                self.value(depth - 1) + b"2",
                self.value(depth - 1) + self.value(depth - 1) + b"0",
                self.value(depth - 1) + b"(" + self.value(depth - 1) + b"1",
                b"P" + b"storage\n",
                self.value(depth - 1) + b"Q",
                b"\x82\x01",
                b"\x83\x01\x00",
                b"\x84\x01\x00\x00\x00",
                b"\x97",
                self.value(depth - 1) + b"\x98",
                b"\x95" + struct.pack("<Q", 2**40),
                b"\x80\x05N",
                self.any_name() + b"\x85R",
            ]
        )


def resolved(name: str) -> Any:
    """Return the object of a name, None if it is not installed."""
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last, None)
    except ImportError:
        return None


class Oracle:
    """State of the interpreter that an input could have changed."""

    def __init__(self) -> None:
        found = [resolved(name) for name in (*known_names(), *STRANGERS)]
        members = [member for one in found if isinstance(one, enum.EnumMeta) for member in one]
        modules = [
            sys.modules[name]
            for name in (
                "builtins",
                "os",
                "pathlib",
                "collections",
                "copyreg",
                "signal",
                "torch",
                "pickle",
                "argparse",
            )
        ]
        modules += [sys.modules[type_.__module__] for type_ in (torch.Size, np.ndarray, torch.futures.Future)]
        modules.append(sys.modules["torch.distributed.checkpoint.metadata"])
        self.watched = {id(one): one for one in (*found, *members, *modules) if hasattr(one, "__dict__")}
        self.events: list[str] = []
        self.active = False
        self.before: dict[Any, Any] | None = None
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Record an audit event that may be an effect."""
        if not self.active or not event.startswith(EVENTS):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
            return
        if event == "import" and args[0] in sys.modules:
            return
        self.events.append(f"{event} {str(args)[:200]}")

    def state(self) -> dict[Any, Any]:
        """Return the attributes of the watched objects by identity, and the rest of the visible state."""
        state: dict[Any, Any] = {
            number: [(key, id(value)) for key, value in list(vars(one).items())]
            for number, one in self.watched.items()
        }
        state |= {
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "files": sorted(os.listdir()),
            "path": list(sys.path),
            "numpy": [np.dtype(code).str for code in "bhilqefdBHILQ?"],
            "default": torch.get_default_dtype(),
            "handlers": [str(torch.get_num_threads()), sys.getrecursionlimit()],
            "modules": len(sys.modules),
        }
        return state

    @contextlib.contextmanager
    def watching(self, effects: list[str]) -> Iterator[None]:
        """Add to `effects` the effects that occur in the context."""
        before = self.before or self.state()
        self.events.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False
            effects += self.events
            after = self.before = self.state()
            effects += [
                f"{self.watched.get(key, key)!r} is changed" for key in before if before[key] != after[key]
            ]


def archive(content: bytes) -> bytes:
    """Return a pickle in the archive that `torch.save` writes."""
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    writer.write_record("data.pkl", content, len(content))
    writer.write_record("byteorder", b"little", 6)
    writer.write_record("data/0", bytes(16), 16)
    writer.write_end_of_file()
    return stream.getvalue()


def doors(content: bytes) -> Iterator[Callable[[], Any]]:
    """Yield all ways in which a pickle of a checkpoint is read."""
    packed = archive(content)
    yield lambda: load_metadata(content, Path(".metadata"))
    yield lambda: objects.load(io.BytesIO(packed))
    yield lambda: objects.load(io.BytesIO(packed), tensor=True)
    yield lambda: objects.checked_bytes("decoder._extra_state/shard_0_1", packed)
    yield lambda: extra_state.harmless([torch.frombuffer(bytearray(content), dtype=torch.uint8)])


def sample_metadata(folder: Path) -> bytes:
    """Return real metadata; this also loads what torch imports late."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.ones(3), "b": [1]}, checkpoint_id=folder, no_dist=True)
    content = (folder / ".metadata").read_bytes()
    stream = io.BytesIO()
    torch.save([torch.ones(2), np.arange(3, dtype="u4"), argparse.Namespace(a=1)], stream)
    for read in (*doors(content), lambda: objects.load(stream)):
        with contextlib.suppress(NotDataError, UserError):
            read()
    return content


def fuzz(
    inputs: int, seed: int, oracle: Oracle, folder: Path
) -> tuple[list[tuple[bytes, list[str]]], Counter[str]]:
    """Read `inputs` pickles in an empty `folder`; return those with an effect, and the counts of outcomes."""
    grammar = Grammar(random.Random(seed), sample_metadata(folder / "sample"))
    bad, ended = [], Counter[str]()
    with contextlib.chdir(folder):
        for _ in range(inputs):
            content = grammar.content()
            effects: list[str] = []
            with oracle.watching(effects):
                for read in doors(content):
                    try:
                        read()
                        ended["read"] += 1
                    except (NotDataError, UserError):
                        ended["refused"] += 1
                    except Exception as error:
                        effects.append(f"an uncaught error: {error!r}"[:500])
            if effects:
                bad.append((content, effects))
    return bad, ended


def main() -> int:
    """Fuzz and print the results; return 1 if an input had an effect."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bad, ended = fuzz(args.inputs, args.seed, Oracle(), Path(folder))
    for content, effects in bad[:20]:
        print(content, *effects[:5], sep="\n    ")
    print(
        f"{args.inputs} inputs (seed {args.seed}), each read in five ways: {ended['refused']} refused, {ended['read']} "
        f"read, {len(bad)} with an effect; {time.monotonic() - begun:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
