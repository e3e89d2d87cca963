"""Helpers that the tests share: small data, plans and trainings, stand-ins, a real Slurm cluster."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
