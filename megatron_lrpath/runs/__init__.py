"""The run folder: the files that a run leaves on disk, and their readers, without torch or Megatron."""
