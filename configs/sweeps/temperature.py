"""Does the gate's sharpness on negative advantages matter? τ_neg × seed, from the quickstart.

Claim     The quickstart is nearly on-policy, so τ_neg changes little: r stays near 1, where
          all gates are 1.
Command   python -m sapo_jax.sweep --config=configs/sweeps/temperature.py \
              --workdir=runs/sweeps/temperature
          (after `make train`, whose cold start all runs share; --config.iterations=20 for a short
          one, --job_index=0 --job_count=4 --most=8 for one of four machines)
Time      32 runs that share every executable; about 32 times the quickstart's 2.5 minutes on 2 CPU
          cores.
Result    Not run at full length yet; experiments/population has a shortened one.
"""

from ml_collections import ConfigDict

from configs import quickstart
from sapo_jax.axes import axis, product


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.name = "temperature"
    c.log.samples = 8
    return c


def get_sweep() -> list[dict]:
    return product(axis("objective.tau_neg", 0.95, 1.0, 1.05, 2.0), axis("seed", *range(8)))
