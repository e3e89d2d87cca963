"""The one door to a checkpoint: its pickles read as data, its bytes verified."""
