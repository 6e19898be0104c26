"""Meshes and processes: what lies where, what crosses devices, who runs."""
