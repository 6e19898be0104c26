"""The policy and the task that the experiments on the paper's claims have in common.

chain_sum of 6, 10 and 14 operands in equal shares, modulo 100, from a teacher who slips in one step
of five and notices two slips of five, which makes the lengths of a group differ. 8 experts, 2 a
token, in both layers; the dense policy has as many active parameters.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import base

TERMS = {"short": 6, "middle": 8, "long": 10}


def task(terms: int, **options) -> dict:
    """A section of config.tasks."""
    own = {"terms": terms, "slip": 0.2, "notice": 0.4, "rewrite": True, **options}
    return {"name": "chain_sum", "options": own}


def cold_start(**fields) -> ConfigDict:
    """Supervised learning of worked answers, which all runs of a kind of policy start from."""
    c = base.get_config()
    with c.unlocked():
        c.name = "evidence_sft"
        c.source = "demonstrations"
        c.iterations = 400
        c.tasks = ConfigDict(
            {name: task(terms) | {"share": 1 / 3} for name, terms in TERMS.items()},
            type_safe=False,
        )
        c.model.preset = "nano_moe"
        c.objective.name = "reinforce"
        c.objective.aggregation = "token_mean"
        c.batch.prompts = 96
        c.batch.group_size = 1
        c.batch.minibatches = 1
        c.learner.learning_rate = 3e-3
        c.learner.schedule = "cosine"
        c.learner.warmup = 20
        c.learner.weight_decay = 0.01
        c.learner.router_aux_coef = 0.01
        c.eval.every = 100
        c.eval.prompts = 96
        c.eval.samples = 4
        c.checkpoint.every = 100
        c.update_from_flattened_dict(fields)
    return c
