"""A stand-in for Transformer Engine 2 on the CPU: what Megatron's layers use, in plain torch, without fp8.

Importable if this folder's parent is on the path (`tests/support/engine_fixtures.py`). It saves the same
state as Transformer Engine, and unpickles loaded state as Transformer Engine does.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["__version__", "common", "pytorch"]
