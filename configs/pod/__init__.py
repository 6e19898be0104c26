"""Experiments for pods, each shown to fit by preflight; docs/pods.md says how to start them."""
