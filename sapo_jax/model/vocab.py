"""Softmax over a vocabulary that may be split over the mesh axis `tensor`.

Arrays [..., V'] hold a device's part of the vocabulary, all of it without a mesh; ids are global.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.parallel import collectives

TENSOR = ("tensor",)


def offset(part: int) -> jax.Array | int:
    """The id of the first of this device's ``part`` entries."""
    return collectives.axis_index("tensor") * part


def sum(values_XV: jax.Array) -> jax.Array:
    """The sum over the vocabulary, [...]."""
    return collectives.psum(jnp.sum(values_XV, -1), TENSOR)


def max(values_XV: jax.Array) -> jax.Array:
    """The maximum over the vocabulary, [...]; not to be differentiated."""
    return collectives.pmax(jnp.max(values_XV, -1), TENSOR)


def all_gather(values_XV: jax.Array) -> jax.Array:
    """The values of the whole vocabulary, on every device."""
    return collectives.all_gather(values_XV, TENSOR, values_XV.ndim - 1)


def log_softmax(logits_XV: jax.Array) -> jax.Array:
    """This device's part of the log-softmax over the whole vocabulary."""
    if collectives.axis_size("tensor") == 1:
        return jax.nn.log_softmax(logits_XV)
    highest_X1 = collectives.pmax(jnp.max(logits_XV, -1, keepdims=True), TENSOR)
    shifted_XV = logits_XV - highest_X1
    return shifted_XV - jnp.log(sum(jnp.exp(shifted_XV)))[..., None]


def pick(values_XV: jax.Array, ids_X: jax.Array) -> jax.Array:
    """The value at each id, [...]."""
    if collectives.axis_size("tensor") == 1:
        return jnp.take_along_axis(values_XV, ids_X[..., None], -1)[..., 0]
    local_X = ids_X - offset(values_XV.shape[-1])
    inside_X = (local_X >= 0) & (local_X < values_XV.shape[-1])
    local_X = jnp.clip(local_X, 0, values_XV.shape[-1] - 1)
    found_X = jnp.take_along_axis(values_XV, local_X[..., None], -1)[..., 0]
    return collectives.psum(jnp.where(inside_X, found_X, 0), TENSOR)


def embed(table_VD: jax.Array, ids_X: jax.Array) -> jax.Array:
    """Rows of the embedding at ids, [..., D]; differentiable."""
    if collectives.axis_size("tensor") == 1:
        return table_VD[ids_X]
    local_X = ids_X - offset(table_VD.shape[0])
    # Negative indices would count from the end.
    local_X = jnp.where(local_X < 0, table_VD.shape[0], local_X)
    return collectives.reduce_from_tensor(table_VD.at[local_X].get(mode="fill", fill_value=0))


def argmax(values_V: jax.Array) -> jax.Array:
    """The first id of the largest value."""
    best = jnp.argmax(values_V)
    if collectives.axis_size("tensor") == 1:
        return best
    highest = collectives.pmax(values_V[best], TENSOR)
    none = jnp.iinfo(jnp.int32).max
    own = jnp.where(values_V[best] == highest, offset(values_V.size) + best, none)
    return collectives.pmin(own, TENSOR)
