"""Arguments: what `pretrain_gpt.py` is told, by a plan or by the path-switching group."""
