"""Guards that stop a run in time: bad numbers, dead ranks, a second owner."""
