"""The product inside a feed-forward layer, of dense layers and of experts."""

import jax


@jax.checkpoint
def swiglu(gate_XF: jax.Array, up_XF: jax.Array) -> jax.Array:
    """silu(gate) · up (arXiv 2002.05202), of which the backward pass keeps the factors alone."""
    return jax.nn.silu(gate_XF) * up_XF
