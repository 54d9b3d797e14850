"""Sweeps: one run for each setting, on one set of ranks, and a ranking of the settings."""
