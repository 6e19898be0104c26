"""The gradient lab on eight devices against one; run by `test_lab` in a process with them."""

import dataclasses

import jax
import numpy as np
import pytest

from sapo_jax import gradlab, learner, model
from sapo_jax.gradlab import tokens
from sapo_jax.model import params
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.parallel import sharding
from tests import fakes
from tests.gradlab.test_lab import made

CASES = {
    "dense": ("nano", {"data": 2, "fsdp": 2, "tensor": 2}),
    "moe": ("nano_moe", {"expert": 2, "fsdp": 2, "tensor": 2}),
}


def everything(lab):
    """What goes over devices: gradients, their products and sketches, and scores of tokens."""
    given = (lab.params, lab.frozen, lab.hp)
    return {
        "gradients": gradlab.compare(lab, lab.targets(), {"gspo": OBJECTIVES["gspo"]}),
        "scores": jax.device_get(tokens.score(*given)),
        "collision": jax.device_get(tokens.collision(*given)),
    }


@pytest.mark.parametrize("kind", CASES)
def test_a_mesh_changes_nothing(kind):
    """Experts are replayed; a prompt has 2 rows, the mesh 4 parts of rows."""
    preset, axes = CASES[kind]
    config = model.make(preset, vocab_size=24)
    weights = fakes.weights(config)
    hp = learner.Hyperparameters(
        OBJECTIVES["sapo"], 0.0, 0.0, 1.0, 0.9, model=config, head_chunk=16
    )
    lab = made(weights, hp, prompts=2, tile=3)
    if kind == "moe":
        routed = [
            batch.replace(routing=learner.score_routing(weights, batch, hp)[1])
            for batch in (lab.frozen, lab.fresh)
        ]
        hp = hp.replace(routing_replay="R3")
        lab = dataclasses.replace(lab, frozen=routed[0], fresh=routed[1], hp=hp)
    mesh = sharding.make_mesh(**axes)
    split = dataclasses.replace(
        lab,
        params=jax.device_put(weights, params.shardings(config, mesh)),
        frozen=sharding.place(lab.frozen, mesh),
        fresh=sharding.place(lab.fresh, mesh),
        hp=hp.replace(mesh=mesh),
    )
    expected, got = everything(lab), everything(split)

    def agree(a, b):
        if a is None or isinstance(a, str):
            assert a == b
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(agree, expected, got, is_leaf=lambda x: x is None)
    assert expected["gradients"]["norm"]["whole"][0] > 1e-3
    assert expected["gradients"]["fidelity"]["reward"][2]["low"] is not None
