"""Imported once by a fork server: what every training process on the CPU would import anew (seconds each)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from megatron_lrpath.training import device as backend

backend.activate("cpu")

import megatron.core.tokenizers.text.libraries.huggingface_tokenizer
import megatron.training  # noqa: F401
import torch
import torch.distributed.checkpoint

from megatron_lrpath.training import seams
from megatron_lrpath.training.options import arguments

seams.apply("cpu")
arguments.full_parser(suppress_defaults=True)
# The first optimizer of a process imports torch's compiler (seconds).
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()
