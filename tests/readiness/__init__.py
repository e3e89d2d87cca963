"""Tests of the check of a plan before anything starts."""
