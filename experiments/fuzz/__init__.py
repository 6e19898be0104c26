"""Odd configs: each is accepted, or refused with its field and value."""
