"""Programs that tests of objectives share: one for all objectives of a kind, of any τ and ε.

Without `jit`, an objective's hundreds of operations are as many programs to compile.
"""

import jax

from sapo_jax import objectives


@jax.jit
def value_and_gradient(objective, logp, old, advantages, mask, segments=None):
    """((loss, metrics), the loss's gradient in log π)."""

    def loss(logp):
        return objectives.policy_loss(objective, logp, old, advantages, mask, segments_BT=segments)

    return jax.value_and_grad(loss, has_aux=True)(logp)


@jax.jit
def of_each_token(objective, logp, old, advantages, mask):
    """The same of every token as a batch of its own."""

    def one(logp, old):
        return value_and_gradient(objective, logp[None], old[None], advantages, mask)

    return jax.vmap(one)(logp, old)


@jax.jit
def coefficients(objective, logp, old, advantages, mask):
    """c of each token, by the gate's own derivative."""
    inputs, _ = objectives.token_inputs(objective, logp, old, advantages, mask)
    return objectives.coefficients(objective, inputs, mask)[0]
