"""Does the gate's sharpness on negative advantages matter? τ_neg × seed, from the quickstart.

Claim     The quickstart is nearly on-policy, so τ_neg changes little: r stays near 1, where
          all gates are 1.
Command   python -m sapo_jax.sweep --config=configs/sweeps/temperature.py \
              --workdir=runs/sweeps/temperature
          (after `make train`, whose cold start all runs share; --config.iterations=20 for a short
          one, --most=8 --job_index=0 --job_count=4 for one of four machines)
Time      32 runs that share every executable: about 1 hour on 2 CPU cores, a quarter of that with
          --config.iterations=20 (of 24 runs, 25 to 53 seconds each, by machine).
Result    Not run at full length. 20 iterations, τ_neg of 1, 1.05 and 2, 8 seeds: Pass@1 of 0.898,
          0.896 and 0.895; differences to the first of −0.2 and −0.3 points, whose 95% intervals
          hold 0 (experiments/population).
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
