"""Load checkpoints that were written with other layers and lack the fp8 states that a model requests.

Transformer Engine's norms have an `_extra_state`, torch's do not. Without fp8 it is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lrpath.checkpoints.metadata import EXTRA_STATE, read_metadata_file
from megatron_lrpath.checkpoints.reader import METADATA


def load(
    original: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **named: Any
) -> Any:
    """Load; a module whose extra state is missing in the checkpoint gets None, which leaves it unchanged.

    Missing weights are still an error.
    """
    from megatron.core.dist_checkpointing.dict_utils import (
        dict_list_map_outplace,  # after the device's choice
    )
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    held = read_metadata_file(Path(checkpoint_dir) / METADATA).state_dict_metadata.keys()

    def wanted(item: Any) -> Any:
        lacks = isinstance(item, ShardedObject) and item.unique_key not in held
        return LocalNonpersistentObject(None) if lacks and item.key.endswith(EXTRA_STATE) else item

    return original(dict_list_map_outplace(wanted, sharded_state_dict), checkpoint_dir, *args, **named)
