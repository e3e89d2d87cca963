"""What stops a run in time: bad numbers, signals, dead ranks, a second owner."""
