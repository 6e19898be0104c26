"""The policy, the task and the cold start that the experiments on the paper's claims share.

Sums of 8, 12 and 18 numbers below 4 in equal shares, worked out step by step, modulo 10. The
teacher slips in one step of seven and notices two slips of five, whereupon it takes the step again:
answers are of 48 to 200 tokens. In both layers 8 experts, 2 a token; the dense policy has as many
active parameters.
"""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from configs import base
from sapo_jax import train
from sapo_jax.training import settings

# Options of chain_sum.
SUM = {"below": 4, "modulus": 10, "slip": 0.15, "notice": 0.4, "labels": True}
TERMS = {"short": 8, "middle": 12, "long": 18}
SMOKE = {"short": 4, "middle": 5, "long": 6}
SEVERAL = {  # tasks, by name
    "small": {"name": "chain_sum", "options": {"terms": 8, **SUM}},
    "large": {"name": "chain_sum", "options": {"terms": 8, **SUM, "below": 8}},
    "countdown": {
        "name": "countdown", "options": {"numbers": 3, "max_number": 10, "max_target": 50},
    },
}  # fmt: skip
KINDS = {
    "moe": {"model.preset": "nano_moe"},
    "dense": {"model.preset": "nano", "model.intermediate_size": 96},
    "several": {"model.preset": "nano_moe"},  # of tasks
}
EVALUATED = {"smoke": (6, 2), "default": (48, 16), "large": (384, 16)}  # prompts, samples
HELD_OUT = "{1} samples of each of {0} held-out problems, a third of each kind".format(
    *EVALUATED["default"]
)


def tasks(size: str, kind: str) -> ConfigDict:
    """config.tasks: three in equal shares, also of the held-out prompts."""
    terms = SMOKE if size == "smoke" else TERMS
    sums = {k: {"name": "chain_sum", "options": {"terms": n, **SUM}} for k, n in terms.items()}
    each = SEVERAL if kind == "several" else sums
    shared = {name: task | {"share": 1 / 3} for name, task in each.items()}
    return ConfigDict(shared, type_safe=False)


def _common(size: str, kind: str) -> ConfigDict:
    c = base.get_config()
    c.unlock()
    c.tasks = tasks(size, kind)
    c.update_from_flattened_dict(KINDS[kind])
    c.eval.prompts, c.eval.samples = EVALUATED[size]
    c.learner.b2 = 0.99
    c.log.trackers = ()
    c.log.samples = 8
    c.checkpoint.every = 10**6  # the minutes between them count
    c.checkpoint.minutes = 3.0
    return c


def cold_start(kind: str, size: str) -> ConfigDict:
    """Supervised learning of worked answers."""
    c = _common(size, kind)
    c.name = f"evidence_cold_{kind}"
    c.source = "demonstrations"
    c.iterations = 2 if size == "smoke" else 400
    c.objective.name = "reinforce"
    c.objective.aggregation = "token_mean"
    c.batch.prompts = 6 if size == "smoke" else 96
    c.batch.group_size = 1
    c.batch.minibatches = 2
    c.learner.learning_rate = 3e-3
    c.learner.schedule = "cosine"
    c.learner.warmup = 20
    c.learner.weight_decay = 0.01
    c.learner.router_aux_coef = 0.0 if kind == "dense" else 0.01
    c.eval.every = 200
    return c.lock()


def start(kind: str, folder: pathlib.Path, size: str) -> pathlib.Path:
    """The run directory of a cold start, trained if it is not there."""
    place = folder / f"{kind}-{size}" if size == "smoke" else folder / kind
    checked = settings.from_config(cold_start(kind, size))
    if not (place / "checkpoints" / str(checked.config.iterations)).exists():
        train.run(checked, place)
    return place


def learning(size: str, kind: str = "moe", **fields) -> ConfigDict:
    """Reinforcement learning from there: 24 rows an update, minibatches of 3 groups of 8."""
    c = _common(size, kind)
    c.name = "evidence"
    c.iterations = 2 if size == "smoke" else 64
    c.objective.name = "sapo"
    c.batch.prompts = 12
    c.batch.group_size = 2 if size == "smoke" else 8
    c.batch.minibatches = 4
    c.learner.learning_rate = 2e-4
    c.learner.warmup = 4
    c.collapse.window = 5
    c.eval.every = max(1, c.iterations // 4)
    c.update_from_flattened_dict(fields)
    return c.lock()
