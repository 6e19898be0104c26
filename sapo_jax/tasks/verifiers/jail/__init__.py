"""The inside of the sandbox: scripts of the standard library alone, started by ``sandbox.py``."""
