"""Objectives of policy optimisation: every method is Σ c·A·∇log π_θ.

    loss, metrics = policy_loss("sapo", logp_BT, old_logp_BT, advantages_B, mask_BT, tau_neg=1.1)

An objective is data; a new one is a gate and a row of the table in `presets`:

    gate              what it does to a token's importance ratio r                  gates.py
    ratio             r of the token, or of its sequence                            ratios.py
    aggregation       how tokens become one number: what is divided by what         aggregations.py
    hyperparameters   scalars, traced: a sweep over τ or ε reuses one executable    presets.py

    OBJECTIVES        the presets by name: sapo, grpo, gspo, dapo, cispo, …
    register, named   one of your own: by a name, or of a file, "my.py:my_objective"
    resolve           a preset or an objective with other hyperparameters, checked
    Schedule          an objective's hyperparameters over a run, one of SHAPES
    switch            several objectives as one, of which a traced index chooses
    policy_loss       (loss to minimise, metrics) of one batch
    policy_terms      the same before the division, to be merged over micro-batches and devices
    finish            divides merged terms, once
    token_inputs      what the gate sees of each token
    coefficients      c of each token, by differentiating the gate
    temperatures      τ of each token
    token_losses      the loss of single tokens, where it is `by_token`; each over its `divisors`
"""

from sapo_jax.masked import finish
from sapo_jax.objectives.loss import (
    by_token,
    coefficients,
    divisors,
    policy_loss,
    policy_terms,
    temperatures,
    token_inputs,
    token_losses,
)
from sapo_jax.objectives.presets import (
    OBJECTIVES,
    Objective,
    Switch,
    named,
    register,
    resolve,
    switch,
)
from sapo_jax.objectives.schedules import SHAPES, Schedule

__all__ = [
    "OBJECTIVES", "SHAPES", "Objective", "Schedule", "Switch", "by_token", "coefficients",
    "divisors", "finish", "named", "policy_loss", "policy_terms", "register", "resolve", "switch",
    "temperatures", "token_inputs", "token_losses",
]  # fmt: skip
