"""Sweeps: a base config, and what each run changes in it."""
