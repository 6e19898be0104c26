"""The quickstart: SAPO takes a 1.2M-parameter policy past its teacher on a laptop CPU.

Task      chain_sum: 7+5-9= is answered by 7+5=12;12-9=3, every step modulo 100 (3-5=98).
Claim     From the cold start of configs/quickstart_sft.py, SAPO with 4 minibatches a rollout raises
          held-out Pass@1 from 0.2–0.5 to ≥ 0.9.
Command   make train
          (the cold start, then python -m sapo_jax.main --config=configs/quickstart.py
          --workdir=runs/quickstart; --config.objective.name=grpo or gspo for the baselines)
Time      2.5 to 4 minutes, by machine, compiling included, on 2 CPU cores.
Result    Pass@1 0.42 → 0.97 for seed 0; over five seeds 0.946 at the end (0.921 to 0.971), GRPO
          0.952, GSPO 0.948 (experiments/quickstart).
"""

from ml_collections import ConfigDict

from configs import quickstart_sft


def get_config() -> ConfigDict:
    c = quickstart_sft.get_config()
    c.name = "quickstart"
    c.source = "rollout"
    c.init_from = "runs/quickstart_sft"
    c.iterations = 100
    c.objective.name = "sapo"
    c.objective.aggregation = None
    c.batch.prompts = 32
    c.batch.group_size = 8
    c.learner.learning_rate = 1e-4
    c.learner.schedule = "constant"
    c.learner.warmup = 8
    c.learner.weight_decay = 0.0
    c.learner.b2 = 0.99
    c.eval.every = 10
    c.eval.samples = 8
    c.checkpoint.every = 20
    return c
