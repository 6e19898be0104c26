"""A run: from a config to files."""
