"""Countdown: reach a target from three numbers, judged by evaluating the expression.

Claim     Where the answer has to be found and not computed, SAPO should raise Pass@1 towards the
          cold start's Pass@16, slowly. An expectation: no full run has been made yet.
Command   python -m sapo_jax.main --config=configs/countdown.py --workdir=runs/countdown
          (after configs/countdown_sft.py)
Time      about 15 minutes on 2 CPU cores.
Result    not measured yet.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.name = "countdown"
    c.init_from = "runs/countdown_sft"
    c.task.name = "countdown"
    c.task.options = ConfigDict({"numbers": 3, "max_number": 20, "max_target": 100})
    c.batch.group_size = 16
    c.eval.samples = 16
    c.iterations = 200
    return c
