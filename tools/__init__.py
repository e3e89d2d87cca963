"""The tools: text to datasets, datasets to version slices, checkpoints to and from Hugging Face folders."""
