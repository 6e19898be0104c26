"""Objectives as data: a gate, a ratio level, an aggregation and traced hyperparameters.

`policy_loss(objective, logp, old_logp, advantages, mask, **hyperparameters)` is the way in;
`OBJECTIVES` has the presets by name, `resolve` changes their hyperparameters, `switch` makes one
objective of several whose traced index chooses.
"""

from sapo_jax.objectives.aggregations import finish
from sapo_jax.objectives.loss import (
    coefficients,
    policy_loss,
    policy_terms,
    resolve,
    token_inputs,
)
from sapo_jax.objectives.presets import OBJECTIVES, Objective, switch

__all__ = [
    "OBJECTIVES", "Objective", "coefficients", "finish", "policy_loss", "policy_terms", "resolve",
    "switch", "token_inputs",
]  # fmt: skip
