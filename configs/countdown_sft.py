"""Cold start of Countdown: imitate solutions without knowing how they were found.

Claim     Solutions should be imitated in form (the numbers, each once, and operators) long before
          the search for the right ones: Pass@1 low, Pass@16 several times as high. An expectation:
          no full run has been made yet.
Command   python -m sapo_jax.main --config=configs/countdown_sft.py --workdir=runs/countdown_sft
Time      about 5 minutes on 2 CPU cores.
Result    not measured yet.
"""

from ml_collections import ConfigDict

from configs import quickstart_sft


def get_config() -> ConfigDict:
    c = quickstart_sft.get_config()
    c.name = "countdown_sft"
    c.task.name = "countdown"
    c.task.options = ConfigDict({"numbers": 3, "max_number": 20, "max_target": 100})
    c.iterations = 300
    c.eval.samples = 16
    c.eval.every = 100
    c.checkpoint.every = 100
    return c
