"""Cold start of Countdown: imitate solutions without knowing how they were found.

Claim     Solutions can be imitated in form (the numbers, each once, and operators) long before the
          search for the right ones is learnt: Pass@1 stays low, Pass@16 is several times as high.
Command   python -m sapo_jax.main --config=configs/countdown_sft.py --workdir=runs/countdown_sft
Time      TIME_CSFT on 2 CPU cores.
Result    RESULT_CSFT
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
