"""Six runs of seconds in two cohorts, for the tests of sweeps."""

from ml_collections import ConfigDict

from sapo_jax.axes import axis, product
from tests import tiny_config

# Rewards that differ within a group, so that there is something to learn: the shorter, the better.
SHORT = {"reward.overlong": 1.0, "reward.buffer": 40, "reward.max_length": 40}


def get_config(**fields) -> ConfigDict:
    c = tiny_config.get_config()
    fixed = {"name": "tiny_sweep", "sampler.slots": 0, "sampler.max_new_tokens": 40, **SHORT}
    times = {"iterations": 4, "eval.every": 2, "checkpoint.every": 2, "log.samples_every": 2}
    c.update_from_flattened_dict({"learner.learning_rate": 2e-4, **fixed, **times, **fields})
    return c


def get_sweep() -> list[dict]:
    return product(axis("objective.tau_neg", 1.05, 2.0), axis("seed", 3, 4, 5))
