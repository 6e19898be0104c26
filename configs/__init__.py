"""Experiments: one file each; `base` holds every field with its default."""
