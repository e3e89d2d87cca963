"""A stand-in for Transformer Engine 2 on the CPU: what Megatron's layers need of it, in plain torch, without fp8.

Importable where this folder's parent is on the path (`tests/support/engine_fixtures.py`). It saves what Transformer
Engine saves, and unpickles what it is given as Transformer Engine does.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["__version__", "common", "pytorch"]
