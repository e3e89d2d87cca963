"""Replacements in torch's and Megatron's distributed checkpointing: how checkpoints are read, and saves are written.

Only `megatron_lrpath.checkpoints` reads. Writing starts no process that a save does not need, and copies no
tensor on the CPU: the copy takes longer than the write there and delays the training during an asynchronous
save, although the forked writers share the memory as it was at the fork.
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._traverse import set_element

from megatron_lrpath.checkpoints import objects, reader
from megatron_lrpath.checkpoints.metadata import EXTRA_STATE, read_metadata_file
from megatron_lrpath.checkpoints.pickle_data import NotDataError
from megatron_lrpath.errors import UserError
from megatron_lrpath.runs.checkpoints import METADATA


def read_metadata(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Read `.metadata` as data (torch's own function is not used)."""
    return reader.own_metadata(Path(self._get_metadata_path(kwargs.get("rank"))), self.load_id)


def read_data(original: Callable[..., Any], self: Any, plan: Any, planner: Any) -> Any:
    """Read tensors and objects as data; the start, or the evaluation, has verified them."""
    return reader.read_data(self, plan, planner, lambda items: None)


def load_bytes(
    original: Callable[..., None], self: Any, read_item: Any, value: Any, *_: Any, **__: Any
) -> None:
    """Load an object of a checkpoint as data (torch's own function is not used)."""
    name = read_item.dest_index.fqn
    try:
        loaded = objects.load(value)
    except NotDataError as error:
        raise UserError(f"the checkpoint's `{name}` holds more than data: {error}.") from None
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


@contextmanager
def load_failures(folder: Path | str | None) -> Iterator[None]:
    """Convert the exceptions of all ranks for an unreadable checkpoint under `folder` to one message.

    Raises:
        UserError: the first cause.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        said = causes[0] if causes else "see the message of rank 0"
        raise UserError(f"{folder}: a checkpoint cannot be read: {said}") from None


def load(
    original: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **named: Any
) -> Any:
    """Load a checkpoint; a module without an extra state in it gets None, which leaves the module unchanged.

    Transformer Engine's norms have an `_extra_state`, torch's do not. Without fp8 it is empty. Missing
    weights are still an error.
    """
    held = read_metadata_file(Path(checkpoint_dir) / METADATA).state_dict_metadata.keys()

    def wanted(item: Any) -> Any:
        lacks = isinstance(item, ShardedObject) and item.unique_key not in held
        return LocalNonpersistentObject(None) if lacks and item.key.endswith(EXTRA_STATE) else item

    return original(dict_list_map_outplace(wanted, sharded_state_dict), checkpoint_dir, *args, **named)


def resolve_data(original: Callable[..., Any], self: Any, write_item: Any, *args: Any, **named: Any) -> Any:
    """Return a tensor that the writer need not copy: the same memory as a storage that ends with the tensor.

    Megatron copies every tensor that is part of a larger buffer, as it must for a GPU's.
    A tensor with gaps is returned unchanged.
    """
    data = original(self, write_item, *args, **named)
    if not isinstance(data, torch.Tensor) or data.device.type != "cpu":
        return data
    whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    if whole or not data.numel() or not data.is_contiguous():
        return data
    memory = data.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(data.dtype).view(data.shape)


def get_write_results_queue(original: Callable[..., Any], *_: Any, **__: Any) -> Any:
    """Return a plain queue for synchronous saves, and one of a manager process for saves by another process."""
    return queue_between_processes() if get_args().async_save else queue_within_process()


@functools.cache
def queue_within_process() -> queue.Queue[Any]:
    """Return a queue for saves that this process writes itself."""
    return queue.Queue()


@functools.cache
def queue_between_processes() -> Any:
    """Return a queue of a manager process at an abstract address: a socket file outlives a killed run."""
    manager = SyncManager(f"\0lrpath-{secrets.token_hex(16)}", ctx=multiprocessing.get_context("fork"))
    manager.start()
    return manager.Queue()
