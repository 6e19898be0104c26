"""A pod that is not there: its programs compiled, measured, and held against what must be met."""
