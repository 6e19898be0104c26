"""Packed rows: which token follows which."""

import jax.numpy as jnp

from sapo_jax.model import segments


def test_positions_start_anew_in_each_segment():
    ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    assert segments.positions(ids)[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert segments.predecessors(ids)[0, :5].tolist() == [0, 0, 1, 3, 3]
    assert segments.multiplicity(ids)[0].tolist() == [1, 1, 1, 1, 1, 0]


def test_positions_go_on_from_the_prompt():
    ids = jnp.array([[1, 1, 2, 2, 2, 3, 4, 4, 0]])
    prefix = jnp.array([[0, 0, 1, 1, 1, 1, 0, 0, 0]])
    assert segments.positions(ids, prefix)[0, :8].tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert segments.predecessors(ids, prefix)[0, :8].tolist() == [0, 0, 1, 2, 3, 1, 6, 6]
    assert segments.multiplicity(ids, prefix)[0].tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 0]
