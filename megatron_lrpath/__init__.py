"""Version updates of large language models by learning-rate path switching, on Megatron-Core."""

__version__ = "0.2.0"
