"""Which objective learns fastest, from the same cold start, prompts and noise? Objective × seed.

Claim     None: the table and its paired differences are the result.
Command   python -m sapo_jax.sweep --config=configs/sweeps/algorithms.py \
              --workdir=runs/sweeps/algorithms
          (after `make train`, whose cold start all runs share)
Time      56 runs; on a CPU each objective compiles an update of its own. About 2 hours on 2 CPU
          cores, from what a run of configs/sweeps/temperature.py takes.
Result    Not run yet. The quickstart alone, 5 seeds: SAPO 0.946, GRPO 0.952, GSPO 0.948
          (experiments/quickstart).
"""

from ml_collections import ConfigDict

from configs import quickstart
from sapo_jax.axes import axis, product

NAMES = ("sapo", "grpo", "gspo", "dapo", "cispo", "gmpo", "reinforce")


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.name = "algorithms"
    c.log.samples = 8
    return c


def get_sweep() -> list[dict]:
    return product(axis("objective.name", *NAMES), axis("seed", *range(8)))
