"""Experiments: several plans in one file that varies a plan; shared trainings run once, and the results are
compared.
"""
