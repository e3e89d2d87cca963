"""The only reader of checkpoints: pickles are parsed as data, bytes are verified."""
