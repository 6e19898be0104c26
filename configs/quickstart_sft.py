"""Cold start of the quickstart: a policy from scratch imitates a teacher who slips.

Claim     Supervised learning of worked answers, one step in four of which is wrong, gives a policy
          whose Pass@1 is about that of its teacher: 0.2–0.5.
Command   python -m sapo_jax.main --config=configs/quickstart_sft.py --workdir=runs/quickstart_sft
Time      2.5 to 4 minutes, by machine, compiling included, on 2 CPU cores.
Result    Pass@1 0.36, 0.27 to 0.45 over five seeds (the teacher: 0.75³ = 0.42).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "quickstart_sft"
    c.source = "demonstrations"
    c.iterations = 150
    c.task.options = ConfigDict({"terms": 4, "slip": 0.25})
    c.objective.name = "reinforce"
    c.objective.aggregation = "token_mean"
    c.batch.prompts = 256
    c.batch.group_size = 1
    c.learner.learning_rate = 3e-3
    c.learner.schedule = "cosine"
    c.learner.warmup = 20
    c.learner.weight_decay = 0.01
    c.eval.every = 50
    c.eval.samples = 1
    c.checkpoint.every = 50
    return c
