"""The extra state of modules: bytes in a `BytesIO` (Transformer Engine 1) or in a tensor (2), unpickled on loading."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import torch

FORM = "STAND_IN_EXTRA_STATE"  # an environment variable: "bytes" for the form of version 1


class ExtraState(torch.nn.Module):
    """A module that saves an extra state, empty without fp8, and loads any pickle."""

    without_fp8: Any = None
    loaded: Any = None

    def get_extra_state(self) -> Any:
        """Return None in an archive (version 1), an empty tensor (2), or `without_fp8` pickled."""
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
