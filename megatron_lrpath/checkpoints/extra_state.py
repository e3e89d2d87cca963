"""The `_extra_state` of a module, which Transformer Engine unpickles unless it is empty.

Without fp8 it is empty. With fp8 it has scales, histories and a recipe: they are parsed as data, checked,
and pickled again, so that Transformer Engine only unpickles data from this process.
"""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from typing import Any

import torch
from torch import Tensor

from megatron_lrpath.checkpoints.metadata import DTYPES
from megatron_lrpath.checkpoints.pickle_data import (
    MENTION,
    May,
    Name,
    NotDataError,
    Persistent,
    Record,
    parse,
    parse_sequence,
)

MAX_STATE_BYTES = 64 * 2**20
PICKLE, MAX_NONE_BYTES = "/data.pkl", 64
TENSORS = frozenset(
    f"{what}_{way}" for what in ("scale", "scale_inv", "amax_history") for way in ("fwd", "bwd")
)
RECIPE, VARIABLES = "recipe", "extra_fp8_variables"
RECIPES = "transformer_engine.common.recipe"
MEGATRONS = "megatron.core.extensions.transformer_engine.TEDelayedScaling"
RECIPE_CLASSES = (
    "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling",
)  # fmt: skip
PART_CLASSES = ("MMParams", "QParams")
# A process that has imported Megatron's safe globals pickles tensors under the second name.
LOADERS = ("torch.storage._load_from_bytes", "megatron.core.safe_globals.safe_load_from_bytes")
NAMES = {
    **dict.fromkeys(DTYPES, MENTION),
    **dict.fromkeys(LOADERS, May.CALL),
    "torch.Size": May.CALL,
    "torch._utils._rebuild_tensor_v2": May.CALL,
    "collections.OrderedDict": May.CALL,
    **{f"{RECIPES}.{name}": May.NEW | May.FIELDS for name in (*RECIPE_CLASSES, *PART_CLASSES)},
    MEGATRONS: May.NEW | May.FIELDS,
    f"{RECIPES}.Format": May.CALL,
    f"{RECIPES}._FormatHelper": May.NEW,
}
STORAGE_NAMES = {"torch.FloatStorage": MENTION}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's old format
MAX_DEPTH = 8


def harmless(value: Any) -> Any:
    """Return an extra state, as loaded by torch's weights-only unpickler, in a safe form.

    Args:
        value: None, an empty state, a byte tensor with a state of fp8, or a `BytesIO` without one (the form of
            Transformer Engine 1, which saves None in an archive of torch's); or a list of these.

    Returns:
        `value` itself if it is empty, None for an archive of None; otherwise the same state, pickled here.

    Raises:
        NotDataError: it is anything else.
    """
    if isinstance(value, list):
        kept = [harmless(part) for part in value]
        return value if all(one is part for one, part in zip(kept, value, strict=True)) else kept
    if value is None or (isinstance(value, Tensor) and value.numel() == 0):
        return value
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1:
        state = _state(parse(value.numpy().tobytes(), NAMES, limit=MAX_STATE_BYTES))
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    if isinstance(value, io.BytesIO):
        return _without_fp8(value) if value.getbuffer().nbytes else value
    raise NotDataError(
        f"an extra state of type {type(value).__name__} is neither empty nor one of Transformer Engine 2"
    )


def _without_fp8(archive: io.BytesIO) -> None:
    """Check that an archive of torch's contains only None. Raise NotDataError otherwise."""
    try:
        with zipfile.ZipFile(archive) as files:
            (pickled,) = (one for one in files.infolist() if one.filename.endswith(PICKLE))
            plain = parse(files.read(pickled), {}) if pickled.file_size < MAX_NONE_BYTES else archive
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise NotDataError(f"an extra state is damaged ({error})") from None
    if plain is not None:
        raise NotDataError("an extra state with fp8 is of Transformer Engine 1; resume it there")


def _state(plain: Any) -> dict[str, Any] | None:
    """Return the state in the parsed pickle: tensors, a recipe, and numbers."""
    if plain is None:
        return None
    if type(plain) is not dict or not plain.keys() <= TENSORS | {RECIPE, VARIABLES}:
        raise NotDataError("it is no state of Transformer Engine's fp8")
    state: dict[str, Any] = {}
    for key, part in plain.items():
        if key in TENSORS:
            state[key] = _tensor(part)
        elif key == RECIPE:
            state[key] = _recipe(part)
        elif type(part) is dict and all(type(name) is str for name in part):
            state[key] = {name: _simple(one, MAX_DEPTH) for name, one in part.items()}
        else:
            raise NotDataError(f"its `{key}` has another form")
    return state


def _simple(plain: Any, depth: int) -> Any:
    """Return numbers, texts, and lists and tuples of them."""
    if type(plain) in (list, tuple) and depth and len(plain) <= 1000:
        return type(plain)(_simple(one, depth - 1) for one in plain)
    if type(plain) not in (bool, int, float, str, type(None)):
        raise NotDataError(f"it holds {type(plain).__name__} where a number belongs")
    return plain


def _tensor(plain: Any) -> Tensor:
    """Return a tensor of fp32 from its pickle: storage, offset, size, stride; the rest is ignored."""
    args = _call(plain, "torch._utils._rebuild_tensor_v2")
    if len(args) < 4 or type(args[1]) is not int or any(type(part) is not tuple for part in args[2:4]):
        raise NotDataError("it holds a tensor of another form")
    packed = _call(args[0], *LOADERS)
    if len(packed) != 1 or type(packed[0]) is not bytes:
        raise NotDataError("it holds a tensor of another form")
    numbers = [args[1], *args[2], *args[3]]
    if len(args[2]) != len(args[3]) or any(type(number) is not int or number < 0 for number in numbers):
        raise NotDataError("it holds a tensor of another form")
    storage = _storage(packed[0])
    last = args[1] + sum((size - 1) * stride for size, stride in zip(args[2], args[3], strict=True))
    if min(args[2], default=1) == 0 or last >= storage.numel():
        raise NotDataError("it holds a tensor that reaches beyond its storage")
    return torch.as_strided(storage, args[2], args[3], args[1]).clone()


def _storage(content: bytes) -> Tensor:
    """Return the numbers of a storage in torch's old format, used by `pickle`: five pickles, then the bytes."""
    pickles, rest = parse_sequence(content, 5, STORAGE_NAMES, persistent=True)
    magic, protocol, system, reference, keys = pickles
    described = reference.key if type(reference) is Persistent else None
    if (
        (magic, protocol) != (MAGIC, PROTOCOL)
        or type(system) is not dict
        or system.get("little_endian") is not True
        or type(described) is not tuple
        or len(described) < 5
        or described[0] != "storage"
        or type(described[1]) is not Name
        or keys != [described[2]]
        or type(described[4]) is not int
        or len(rest) != 8 + 4 * described[4]
        or int.from_bytes(rest[:8], "little") != described[4]
        or not described[4]
    ):
        raise NotDataError("it holds a tensor that is not of fp32, or damaged")
    return torch.frombuffer(bytearray(rest[8:]), dtype=torch.float32)


def _call(plain: Any, *names: str) -> tuple[Any, ...]:
    """Return the arguments of a call of one of `names`."""
    if type(plain) is not Record or plain.name not in names or plain.state is not None:
        raise NotDataError(f"it holds something else where {names[0].rpartition('.')[2]} belongs")
    return plain.args


def _recipe(plain: Any) -> Any:
    """Return a recipe of the installed Transformer Engine with the values of the parsed one.

    Megatron's subclass is replaced by its base class: the additions come from Megatron's arguments.
    """
    if type(plain) is not Record:
        raise NotDataError("its recipe has another form")
    name = "DelayedScaling" if plain.name == MEGATRONS else plain.name.removeprefix(f"{RECIPES}.")
    return _made(name, RECIPE_CLASSES, plain)


def _made(name: str, allowed: tuple[str, ...], plain: Record) -> Any:
    """Return a data class of Transformer Engine from a record's fields; cached texts (`_…`) are not copied."""
    if name not in allowed or plain.args or type(plain.state) is not dict:
        raise NotDataError("its recipe has another form")
    fields = {key: _value(value) for key, value in plain.state.items() if not key.startswith("_")}
    try:
        return getattr(_recipes(), name)(**fields)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise NotDataError(f"its recipe is none of the installed Transformer Engine's ({error})") from None


def _value(plain: Any) -> Any:
    """Return a field of a recipe: a number, a text, a number format, or parameters of a product."""
    if type(plain) is not Record:
        return _simple(plain, MAX_DEPTH)
    name = plain.name.removeprefix(f"{RECIPES}.")
    return _format(plain) if name == "Format" else _made(name, PART_CLASSES, plain)


def _format(plain: Record) -> Any:
    """Return the member of the enumeration with the two maximum values in the file."""
    helper = plain.args[0] if len(plain.args) == 1 else None
    if type(helper) is Record and helper.name == f"{RECIPES}._FormatHelper":
        for member in _recipes().Format:
            if tuple(member.value) == tuple(_simple(part, 0) for part in helper.args):
                return member
    raise NotDataError("its recipe has an unknown number format")


def _recipes() -> Any:
    """Return the installed Transformer Engine's recipes."""
    try:
        return importlib.import_module(RECIPES)
    except ImportError:
        raise NotDataError("a state of fp8 can only be read where Transformer Engine is installed") from None
