"""The extra state of modules: bytes in a `BytesIO` (Transformer Engine 1) or in a tensor (2), unpickled on loading."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import torch

FORM = "STAND_IN_EXTRA_STATE"  # a variable of the environment: "bytes" for the form of version 1


class ExtraState(torch.nn.Module):
    """A module that saves a state of its own, empty without fp8, and takes any that is a pickle."""

    without_fp8: Any = None
    loaded: Any = None

    def get_extra_state(self) -> Any:
        """What is saved: None in an archive in version 1, an empty tensor in 2; operations pickle `without_fp8`."""
        if self.without_fp8 is not None:
            return torch.frombuffer(bytearray(pickle.dumps(self.without_fp8)), dtype=torch.uint8)
        if os.environ.get(FORM) != "bytes":
            return torch.empty(0, dtype=torch.uint8)
        stream = io.BytesIO()
        torch.save(None, stream)
        return stream

    def set_extra_state(self, state: Any) -> None:
        """Unpickle any content, as Transformer Engine does."""
        if isinstance(state, io.BytesIO):
            state.seek(0)
            self.loaded = torch.load(state, weights_only=False)
        elif isinstance(state, torch.Tensor):
            self.loaded = pickle.loads(state.numpy().tobytes()) if state.numel() else None
        elif state is not None:
            raise RuntimeError("Unsupported checkpoint format.")
