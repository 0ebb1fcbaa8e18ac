"""Faults that a training survives, as a campaign: ``python -m tests.faults``."""
