"""What a run leaves on disk and how it is read: the run folder, without torch or Megatron."""
