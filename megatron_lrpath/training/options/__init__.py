"""The arguments of `pretrain_gpt.py`, from a plan or from the path-switching group."""
