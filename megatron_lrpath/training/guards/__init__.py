"""Guards that stop a run in time: bad numbers, signals, dead ranks, a second owner."""
