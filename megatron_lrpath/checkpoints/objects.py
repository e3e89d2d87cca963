"""The objects and tensors of a checkpoint: torch's weights-only loading, after the pickles are parsed as
data.

Torch's weights-only unpickler limits the names in a file, but it can set attributes on members of the
enumerations that Megatron registers (`signal.SIGTERM` among them), and they persist. So `pickle_data`
parses each pickle before torch does; both extract it from the archive by the same code of torch.
"""

from __future__ import annotations

import functools
import inspect
import io
import pickle
from collections.abc import Callable, Mapping
from enum import Enum
from typing import IO, Any

import torch

from megatron_lrpath.checkpoints.extra_state import harmless
from megatron_lrpath.checkpoints.metadata import DTYPES, EXTRA_STATE
from megatron_lrpath.checkpoints.pickle_data import MENTION, SCALARS, May, Name, NotDataError, Record, parse
from megatron_lrpath.errors import UserError

PICKLE, SCRIPT = "data.pkl", "constants.pkl"
REBUILD = "torch._utils._rebuild_tensor_v2"
TORCH_NAMES = {
    **dict.fromkeys(DTYPES, MENTION),
    **{f"torch.{name}": MENTION for name in vars(torch) if name.endswith("Storage")},
    "torch.storage.UntypedStorage": MENTION,
    REBUILD: May.CALL,
    "torch._utils._rebuild_parameter": May.CALL,
    "torch.Size": May.CALL,
    "torch.device": May.CALL,
    "torch.serialization._get_layout": May.CALL,
    "_codecs.encode": May.CALL,
    "builtins.set": May.CALL,
    "builtins.complex": May.CALL,
    "collections.OrderedDict": May.CALL | May.ITEMS,
}


DATA_CLASSES = {
    "argparse.Namespace": May.NEW | May.CALL | May.FIELDS,
    "types.SimpleNamespace": May.NEW | May.CALL | May.FIELDS,
    "megatron.core.optimizer.optimizer_config.OptimizerConfig": May.NEW | May.FIELDS,
    "pathlib.PosixPath": May.CALL,
    "numpy.dtype": May.CALL | May.STATE,
    "_io.BytesIO": May.NEW | May.STATE,
}
RECONSTRUCT = "numpy._core.multiarray._reconstruct"


@functools.cache
def object_names() -> Mapping[str, May]:
    """Return the allowed uses of names in an object: torch's data, and the classes that Megatron registers.

    Of the latter, members of enumerations can be named by their values (each exists once and must not be
    changed), the data classes above can be created, and other names can only be mentioned.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS, register_safe_globals

    register_safe_globals()
    names = {**TORCH_NAMES, RECONSTRUCT: May.CALL | May.STATE}
    for one in SAFE_GLOBALS:
        name = f"{one.__module__}.{one.__qualname__}"
        is_member = inspect.isclass(one) and issubclass(one, Enum)
        names.setdefault(name, DATA_CLASSES.get(name, May.CALL if is_member else MENTION))
    return names


def _is_scalars(parts: Any) -> bool:
    return all(type(part) in SCALARS for part in parts)


ARGUMENTS: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    # numpy's own types exist once; a copy may be given a state
    "numpy.dtype": lambda args: len(args) == 3 and type(args[0]) is str and args[1:] == (False, True),
    "_codecs.encode": lambda args: len(args) == 2 and type(args[0]) is str and args[1] == "latin1",
    "builtins.set": lambda args: len(args) == 1 and type(args[0]) is list and _is_scalars(args[0]),
    "builtins.complex": _is_scalars,
    "pathlib.PosixPath": lambda args: all(type(part) is str for part in args),
    "collections.OrderedDict": lambda args: args == (),
}


def check_stream(stream: IO[bytes], tensor: bool) -> None:
    """Parse what torch would unpickle from an archive, and rewind the stream.

    Args:
        stream: the output of `torch.save`.
        tensor: whether it must be one tensor; otherwise any object.

    Raises:
        NotDataError: it is not such an archive, or has more than data.
    """
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":
        raise NotDataError("it is no archive that torch.save writes")
    stream.seek(0)
    try:
        archive = torch._C.PyTorchFileReader(stream)
        if SCRIPT in archive.get_all_records():
            raise NotDataError("it is a program (TorchScript)")
        content = archive.get_record(PICKLE)
    except RuntimeError as error:
        raise NotDataError(f"it is damaged ({str(error).splitlines()[0][:200]})") from None
    plain = parse(content, TORCH_NAMES if tensor else object_names(), persistent=True)
    if tensor and not (type(plain) is Record and plain.name.startswith("torch._utils._rebuild_")):
        raise NotDataError("it is no tensor")
    check_parts(plain)
    stream.seek(0)


def check_parts(plain: Any) -> None:
    """Refuse data that would have an effect in its consumer.

    Raises:
        NotDataError: a key that Megatron would pass to Transformer Engine (which unpickles it), or arguments that are
            not in `ARGUMENTS`.
    """
    seen: set[int] = set()
    pending = [plain]
    while pending:
        part = pending.pop()
        if id(part) in seen or type(part) in (str, int, float, bool, bytes, Name):
            continue
        seen.add(id(part))
        if type(part) is Record:
            if part.name in ARGUMENTS and not ARGUMENTS[part.name](part.args):
                raise NotDataError(f"it calls {part.name} with something that has no place in a checkpoint")
            pending += [part.args, part.items, part.state]
        elif type(part) is dict:
            if any(type(key) is str and EXTRA_STATE in key for key in part):
                raise NotDataError(f"it holds an `{EXTRA_STATE}` where none belongs")
            pending += [*part, *part.values()]
        elif type(part) in (list, tuple):
            pending += part


def load(stream: IO[bytes], tensor: bool = False) -> Any:
    """Return the object, or the tensor, in an archive, on the CPU.

    Raises:
        NotDataError: it is damaged or has more than data. Nothing was executed or changed.
    """
    check_stream(stream, tensor)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        EOFError,
    ) as error:
        raise NotDataError(f"it is damaged ({str(error).splitlines()[0][:200]})") from None


def checked_bytes(name: str, content: bytes) -> bytes:
    """Return an object's bytes, which are safe for any loader.

    They are the file's own, except a state of Transformer Engine's fp8, which is pickled again.

    Args:
        name: the object's in the checkpoint.
        content: the file's bytes.

    Raises:
        UserError: it has more than data, or is damaged.
    """
    stream = io.BytesIO(content)
    try:
        if EXTRA_STATE not in name:
            check_stream(stream, tensor=False)
            return content
        loaded = load(stream)
        kept = harmless(loaded)
    except NotDataError as error:
        raise UserError(f"the checkpoint's `{name}` holds more than data: {error}.") from None
    if kept is loaded:
        return content
    written = io.BytesIO()
    torch.save(kept, written)
    return written.getvalue()
