"""Settings of every test: one thread a process, and the warnings of the libraries beneath us kept out of the report."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
