"""What is odd about a config: fields, and values that are wrong for them, or may be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from sapo_jax import cli
from sapo_jax.advantages import ESTIMATORS
from sapo_jax.corrections import CORRECTIONS
from sapo_jax.model import PRESETS
from sapo_jax.model.config import ATTENTION
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.tasks import TASKS
from tests import tiny_config

Changes = dict[str, Any]  # dotted field → value
FINE = {"accepted", "refused", "trained"}
NUMBERS = [
    0, 1, -1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**63, 10**20, -(10**20), 10**400, 0.0, -0.0, 0.5,
    1.5, -0.5, 1e-320, 1e-8, 1e20, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", " ", "x", "None", "true", "null", "1", "nan", "sapo", "gpro", "token_mean", "float16",
    "bf16", "../..", "/dev/null", "my.py:x", "a" * 300, "\u0661", "café", "a=b", "{}", "[1",
    "a\nb", "a\0b", "{'a': true}", "-", "~",
]  # fmt: skip
OTHERS = [
    None, True, False, [], [1], {}, {"a": 1}, {"name": "sapo"}, (1, 2), b"x", {1}, 1j, len,
    np.int64(2), np.float32("nan"), np.zeros(2), [[None]],
]  # fmt: skip
POOLS = (NUMBERS, TEXTS, OTHERS)
HYPERPARAMETERS = sorted({key for preset in OBJECTIVES.values() for key in preset.hyperparameters})
OPTIONS = "terms", "digits", "modulus", "slip", "numbers", "directory", "verifier", "level", "train"
SMALL = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
DTYPES = ["float32", "bfloat16", "float16"]
TOGETHER = [  # fields that bound one another, with values that each may have
    {
        "mesh.data": [1, 2, 4, -1], "mesh.fsdp": [1, 2, 4, -1], "mesh.tensor": [1, 2, 4],
        "mesh.expert": [1, 2], "batch.prompts": SMALL, "batch.minibatches": SMALL[:5],
    },
    {
        "batch.prompts": SMALL, "batch.group_size": SMALL, "batch.minibatches": SMALL,
        "batch.micro_batches": SMALL, "batch.oversample": SMALL[:5], "sampler.slots": SMALL,
    },
    {
        "sampler.max_new_tokens": [*SMALL, 2**20], "sampler.slots": SMALL,
        "sampler.temperature": [0.5, 1.0], "data.max_prompt_tokens": SMALL,
        "model.max_position_embeddings": [1, 8, 9, 16, 2**20], "reward.max_length": SMALL,
        "reward.buffer": SMALL, "reward.overlong": [0.0, 0.5], "task.options.terms": [2, 3, 8],
    },
    {
        "objective.name": sorted(OBJECTIVES), "advantages": sorted(ESTIMATORS),
        "batch.group_size": [1, 2, 4], "source": ["rollout", "demonstrations"],
        "objective.aggregation": ["seq_mean", "token_mean", "const_len"],
        "objective.max_length": [1.0, 8.0], "learner.old_logp": ["sampler", "recompute"],
    },
    {
        "batch.pack": [True, False], "batch.share_prefix": [True, False, None],
        "model.attention": sorted(ATTENTION), "batch.micro_batches": SMALL[1:6],
        "batch.group_size": SMALL, "learner.head_chunk": SMALL, "mesh.data": [1, 4],
        "learner.routing_replay": ["none", "R3"], "model.preset": ["nano", "nano_moe"],
        "dtype.compute": DTYPES,
    },
    {
        "dtype.params": DTYPES, "dtype.compute": DTYPES, "dtype.cache": DTYPES,
        "model.preset": sorted(PRESETS), "model.attention": sorted(ATTENTION),
        "learner.routing_replay": ["none", "R2", "R3"], "learner.old_logp": ["recompute"],
        "learner.router_aux_coef": [0.0, 0.1],
    },
    {
        "correction.name": ["none", *sorted(CORRECTIONS)], "correction.low": [0.5, 2.0, -1.0],
        "correction.high": [0.5, 2.0, float("inf")], "learner.old_logp": ["sampler", "recompute"],
        "source": ["rollout", "demonstrations"],
    },
    {
        "model.hidden_size": [2, 16, 24, 63], "model.num_attention_heads": SMALL,
        "model.num_key_value_heads": SMALL, "model.head_dim": SMALL,
        "model.intermediate_size": SMALL, "model.num_hidden_layers": SMALL,
    },
    {
        "eval.every": SMALL, "eval.prompts": [1, 8, 9, 4097], "eval.samples": SMALL,
        "eval.temperature": [0.0, 1e-6, 1.0], "eval.top_k": SMALL, "eval.top_p": [0.0, 0.5, 1.0],
    },
    {
        "learner.schedule": ["constant", "linear", "cosine"], "learner.warmup": [*SMALL, 10**6],
        "iterations": SMALL, "batch.minibatches": [1, 2, 4], "learner.head_chunk": SMALL,
        "learner.remat": [True, False], "population.method": ["auto", "map", "vmap", "devices"],
    },
    {
        "task.name": sorted(TASKS), "task.options.terms": [2, 3], "task.options.numbers": [3, 4],
        "task.options.directory": ["/dev/null", "tests"], "eval.prompts": [8, 4097],
        "reward.kl_coef": [0.0, 0.1], "init_from": ["", "tests"], "tokenizer.directory": ["tests"],
    },
]  # fmt: skip
SHARE = {"name": "countdown", "options": {"numbers": 3}, "share": 0.5}
NAMES = "a", "b", "", "a b", "a.b", "share", "name", "self"


def mixture(rng: random.Random) -> dict[str, Any]:
    """Two tasks in shares, of which one has something odd."""
    odd, value = dict(SHARE), rng.choice(rng.choice(POOLS))
    key = rng.choice(("name", "options", "share", "option", "more"))
    if key == "option":
        odd["options"] = {rng.choice((*OPTIONS, *NAMES)): value}
    else:
        odd[key] = value
    return {"a": SHARE, rng.choice(NAMES): odd}


def misspelt(name: str, rng: random.Random) -> str:
    """A name with a letter less, or two that changed places."""
    i = rng.randrange(len(name) - 1)
    middle = "" if rng.random() < 0.5 else name[i + 1] + name[i]
    return name[:i] + middle + name[i + 1 + bool(middle) :]


def draw(count: int, rng: random.Random) -> Iterator[tuple[str, Changes]]:
    """So many configs: what kind of oddness each has, and what is changed.

    Half of them go through all fields and sections, in turn, with values of any type; a quarter
    combines values that are right by themselves; the others misspell, and change several fields.
    """
    fields = sorted(cli.flat(tiny_config.get_config(), sections=True))
    fields += [f"objective.{key}" for key in HYPERPARAMETERS] + ["task.options.digits"]
    pools = [rng.sample(pool, len(pool)) for pool in POOLS]
    for i in range(count):
        if i % 4 in (0, 3):  # so that both ways of giving a field take half of them
            turn, place = divmod(i // 2, len(fields))
            pool = pools[(turn + place) % len(pools)]
            yield "a value", {fields[place]: pool[i // 2 % len(pool)]}
        elif i % 8 in (1, 2):
            group = TOGETHER[i // 4 % len(TOGETHER)]
            some = rng.sample(sorted(group), rng.choice((2, 3, 4)))
            yield "a combination", {field: rng.choice(group[field]) for field in some}
        elif i % 32 in (5, 22):
            yield "a mixture", {"tasks": mixture(rng)}
        elif i % 16 in (5, 6):
            yield "a name", {misspelt(rng.choice(fields), rng): rng.choice(rng.choice(POOLS))}
        else:
            some = rng.sample(fields, rng.choice((2, 3)))
            some += [f"task.options.{rng.choice(OPTIONS)}"] * (rng.random() < 0.2)
            yield "several values", {field: rng.choice(rng.choice(POOLS)) for field in some}
