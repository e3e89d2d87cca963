"""Replace Megatron's loading by the reader in `megatron_lrpath.checkpoints`: the functions that the seams
install.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_lrpath.checkpoints import objects, reader
from megatron_lrpath.checkpoints.pickle_data import NotDataError
from megatron_lrpath.errors import UserError


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
    from torch.distributed.checkpoint._traverse import set_element

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
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        said = causes[0] if causes else "see the message of rank 0"
        raise UserError(f"{folder}: a checkpoint cannot be read: {said}") from None
