"""Updates: exact accumulation, the optimizer against optax by hand, no logits-sized buffer."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapo_jax import learner, objectives
from sapo_jax.learner import diagnostics
from sapo_jax.masked import finish
from sapo_jax.model import params
from sapo_jax.objectives import policy_loss
from sapo_jax.types import Batch
from tests import fakes
from tests.fakes import VOCAB

B, S = 8, 12


def settings(config, name="sapo", **kw):
    objective = objectives.resolve(name, **({"max_length": 8.0} if name == "dr_grpo" else {}))
    return learner.Hyperparameters(
        objective, 1e-3, 0.0, 1e9, 1.0, model=config, **{"head_chunk": 16, **kw}
    )


@pytest.fixture
def batch(rng):
    length = rng.integers(3, S + 1, B)
    length[2] = 2  # no completion
    index = np.arange(S)
    return Batch(
        tokens=rng.integers(2, VOCAB, (B, S)).astype(np.int32),
        mask=(index >= 2) & (index < length[:, None]),
        segments=(index < length[:, None]).astype(np.int32),
        sampler_logp=rng.normal(-3, 0.3, (B, S)).astype(np.float32),
        old_logp=rng.normal(-3, 0.3, (B, S)).astype(np.float32),
        advantages=rng.normal(size=B).astype(np.float32),
    )


def plain_loss(weights, batch, hp):
    """The loss with full logits and no micro-batches, as one would write it first."""
    from sapo_jax.model import transformer

    hidden, _ = transformer.hidden(weights, hp.static.model, batch.tokens, batch.segments)
    logits = transformer.logits_of(weights, hp.static.model, hidden) / hp.temperature
    logp = jax.nn.log_softmax(logits[:, :-1])
    logp = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], -1)[..., 0]
    logp = jnp.pad(logp, ((0, 0), (1, 0)))
    return policy_loss(hp.objective, logp, batch.old_logp, batch.advantages, batch.mask)[0]


PRESETS = ("sapo", "gspo", "dapo", "dr_grpo")
expected_gradient = jax.jit(jax.value_and_grad(plain_loss))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("micro", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 8])
def test_gradient_is_that_of_the_plain_loss_for_any_split(nano, batch, name, micro):
    """Dividing per micro-batch, or by the number of micro-batches, is the classic mistake.

    The presets are members of a switch, and share one program for each split.
    """
    config, weights = nano
    hp = settings(config, name)
    loss, expected = expected_gradient(weights, batch, hp)
    either = {"index": PRESETS.index(name), "max_length": 8.0}
    objective = objectives.resolve(objectives.switch(PRESETS), **either)
    shared = hp.replace(objective=objective, micro_batches=micro)
    grads, terms = jax.jit(learner.gradient)(weights, batch, shared)
    assert float(finish(terms)[0]) == pytest.approx(float(loss), abs=1e-6)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, expected)


def test_update_is_adamw_by_hand(nano, batch):
    """Learning rate, clipping and decoupled decay (matrices only) as optax.adamw has them."""
    config, weights = nano
    hp = dataclasses.replace(
        settings(config), weight_decay=0.1, max_grad_norm=0.01, warmup=4, schedule="linear", total=9
    )
    state = learner.init(jax.tree.map(jnp.copy, weights), hp)
    decays = jax.tree.map(lambda s: s.fan_in > 0, params.table(config))

    def adamw(rate):
        return optax.chain(
            optax.clip_by_global_norm(0.01),
            optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decays),
        )

    @jax.jit
    def by_hand(mine, opt_state, rate, batch):
        grads, _ = learner.gradient(mine, batch, hp)
        updates, opt_state = adamw(rate).update(grads, opt_state, mine)
        return optax.apply_updates(mine, updates), opt_state, optax.tree.norm(grads)

    mine, opt_state = weights, jax.jit(adamw(0.0).init)(weights)
    factors = [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6]
    for step, factor in enumerate(factors):
        rate = 1e-3 * factor
        assert float(learner.learning_rate(hp, jnp.int32(step))) == pytest.approx(rate, rel=1e-5)
        mine, opt_state, norm = by_hand(mine, opt_state, rate, batch)
        state, metrics = learner.update(state, batch, hp)
        assert float(finish(metrics)[1]["grad/norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert int(state.update) == len(factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), state.params, mine)


@pytest.mark.slow
def test_padding_width_changes_nothing(nano, batch):
    config, weights = nano
    hp = settings(config)

    def widen(x):
        return np.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x

    wide = jax.tree.map(widen, batch)
    grads, _ = jax.jit(learner.gradient)(weights, batch, hp)
    padded, _ = jax.jit(learner.gradient)(weights, wide, hp)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, padded)


@pytest.mark.parametrize("before", [0, 2])
def test_an_empty_batch_moves_nothing(nano, batch, before):
    """No token, no step: Adam's moments and weight decay would move the parameters without one."""
    config, weights = nano
    hp = dataclasses.replace(settings(config), weight_decay=0.1, schedule="linear", total=9)
    nothing = batch.replace(mask=np.zeros_like(batch.mask))
    state = learner.init(jax.tree.map(jnp.copy, weights), hp)
    for _ in range(before):
        state, _ = learner.update(state, batch, hp)
    expected = jax.device_get(state)
    state, metrics = learner.update(state, nothing, hp)
    assert float(finish(metrics)[1]["grad/norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def test_what_was_not_measured_is_no_number(nano, batch):
    """An entropy of 0 would read as a collapse; means leave the empty minibatches out."""
    config, weights = nano
    hp = settings(config)
    nothing = batch.replace(mask=np.zeros_like(batch.mask))

    def learnt(*minibatches):
        state, record = learner.learn(
            learner.init(jax.tree.map(jnp.copy, weights), hp), minibatches, hp
        )
        return int(state.update), record

    (one, alone), (same, both), (none, empty) = (
        learnt(batch), learnt(batch, nothing), learnt(nothing)
    )  # fmt: skip
    assert (one, same, none) == (1, 1, 0)
    assert (alone["update"], both["update"], empty["update"]) == (1, 1, 0)
    first, last = both.pop("minibatch")
    assert [first] == alone.pop("minibatch")
    late = [key for key in alone if key.startswith(diagnostics.OFF_POLICY)]
    behind, _ = ({key: found.pop(key) for key in late} for found in (both, alone))
    assert both == alone
    for key, value in behind.items():  # of minibatches behind the first
        assert not any(value["counts"]) if key.startswith("histogram/") else np.isnan(value)
    assert empty["update/skipped"] == 0  # that counts what is not finite
    _, equal = learnt(batch.replace(advantages=np.zeros_like(batch.advantages)))
    for key in ("policy/gate_mean", "policy/clipped", "policy/eur", "coefficient/pos_below"):
        assert np.isnan([equal[key], equal["minibatch"][0][key]]).all(), key
    assert equal["policy/entropy"] == pytest.approx(alone["policy/entropy"])
    for found in (last, *empty.pop("minibatch"), empty):
        for key, value in found.items():
            if key.startswith("histogram/"):
                assert not any(value["counts"])
            elif not key.startswith("update"):
                assert not np.isfinite(value), key


def _at(field, value):
    def damage(params, batch):
        x = np.array(getattr(batch, field))
        x[(1, 3) if x.ndim == 2 else 1] = value
        return params, batch.replace(**{field: x})

    return damage


def _weight(value):
    def damage(params, batch):
        down = np.array(params["layers"]["down"])
        down[0, 0, 0] = value
        return params | {"layers": params["layers"] | {"down": down}}, batch

    return damage


LOST = {
    "reward": (_at("advantages", np.nan), _at("advantages", -np.inf)),
    "old_logp": (_at("old_logp", np.nan), _at("old_logp", np.inf)),
    "ref_logp": (_at("ref_logp", np.nan),),
    "correction": (_at("weights", np.inf),),
    "logits": (_weight(np.inf), _weight(np.nan)),
    "loss": (_at("advantages", 3e38),),
    "gradient": (_at("advantages", 1e30),),
}
CASES = [(first, damage) for first, every in LOST.items() for damage in every]


@pytest.mark.parametrize(("first", "damage"), CASES)
def test_what_is_not_finite_moves_nothing(nano, batch, first, damage):
    """Neither parameters nor moments nor the step; once it is mended, training goes on."""
    config, weights = nano
    hp = settings(config)
    whole = batch.replace(ref_logp=batch.old_logp, weights=np.ones_like(batch.old_logp))
    healthy = learner.init(jax.tree.map(jnp.copy, weights), hp)
    params, lost = damage(weights, whole)
    state = learner.init(jax.tree.map(jnp.array, params), hp)
    before = jax.device_get(state)
    state, metrics = learner.update(state, lost, hp)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    record = learner.record(state.update, *learner.finish_iteration((metrics,)))
    assert (record["update"], record["update/skipped"]) == (0, 1)
    assert record["minibatch"][0]["update/nonfinite"] == first
    assert record["grad/update_norm"] == 0
    state, metrics = learner.update(healthy, whole, hp)
    record = learner.record(state.update, *learner.finish_iteration((metrics,)))
    assert (record["update"], record["update/skipped"]) == (1, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_what_is_masked_out_may_be_anything(nano, batch):
    """Padding and rows without a completion count for nothing, whatever stands there."""
    config, weights = nano
    state = learner.init(jax.tree.map(jnp.copy, weights), settings(config))
    batch = batch.replace(old_logp=np.where(batch.mask, batch.old_logp, np.nan))
    batch.advantages[2] = np.nan
    state, metrics = learner.update(state, batch, settings(config))
    assert int(state.update) == 1
    assert not finish(metrics)[1]["nonfinite"].any()


def test_parameters_of_few_bits_are_refused(nano):
    """In bfloat16 0.4% of the parameters move at a learning rate of 1e-6."""
    config, weights = nano
    with pytest.raises(ValueError, match=r"params/embed in bfloat16: must be float32"):
        learner.init(jax.tree.map(jnp.bfloat16, weights), settings(config))


def test_one_executable_for_every_traced_hyperparameter(nano, batch):
    """A sweep over τ, the learning rate or the temperature reuses one program."""
    config, weights = nano
    state = learner.init(jax.tree.map(jnp.copy, weights), settings(config))

    def point(tau, rate, temperature):
        return learner.Hyperparameters(
            objectives.resolve("sapo", tau_pos=tau), rate, 0.0, 1.0, temperature,
            model=config, head_chunk=16,
        )  # fmt: skip

    state, _ = learner.update(state, batch, point(1.0, 1e-3, 1.0))
    with fakes.Compilations() as compilations:
        for values in ((0.5, 1e-4, 0.7), (2.0, 1e-2, 1.3)):
            state, _ = learner.update(state, batch, point(*values))
    assert compilations.count == 0


def test_an_update_has_the_objective_of_its_iteration(nano, batch):
    """Of iteration 3 of 5, halfway: τ as a schedule has it there, and no program of its own."""
    config, weights = nano
    start, end = (objectives.resolve("sapo", tau_neg=tau) for tau in (1.0, 5.0))
    hp = settings(config, objective_schedule=objectives.Schedule(end, 1, 5)).replace(
        objective=start
    )

    def updated(hp, iteration):
        state = learner.init(jax.tree.map(jnp.copy, weights), hp)
        state, metrics = learner.update(state.replace(iteration=jnp.int32(iteration)), batch, hp)
        return state.params, finish(metrics)[0]

    halfway = hp.replace(objective=objectives.resolve(start, tau_neg=3.0), objective_schedule=None)
    found, expected = updated(hp, 2), updated(halfway, 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, expected
    )
    assert float(updated(hp, 0)[1]) != float(found[1])
    with fakes.Compilations() as compilations:
        updated(hp.replace(objective_schedule=objectives.Schedule(start, 2, 9)), 4)
    assert compilations.count == 0


def test_state_is_donated(nano, batch):
    config, weights = nano
    hp = settings(config)
    state = learner.init(jax.tree.map(jnp.copy, weights), hp)
    learner.update(state, batch, hp)
    assert state.params["embed"].is_deleted()


def test_no_buffer_has_the_vocabulary_and_more_rows_than_a_chunk(nano):
    """[B·S, V] logits are what runs out of memory first; the chunk bounds them."""
    config, _ = nano
    rows, width, chunk = 16, 40, 128
    vocab = 509  # prime: no other size is a multiple of it
    config = dataclasses.replace(config, vocab_size=vocab)
    abstract = params.abstract(config)
    hp = settings(config, head_chunk=chunk, micro_batches=1)
    shape = (rows, width)
    f32, i32 = jnp.float32, jnp.int32
    batch = Batch(
        *(jax.ShapeDtypeStruct(shape, t) for t in (i32, jnp.bool_, i32, f32, f32)),
        jax.ShapeDtypeStruct((rows,), f32),
    )
    assert rows * (width - 1) >= 4 * chunk
    state = jax.eval_shape(learner.init, abstract, hp)
    text = learner.update.lower(state, batch, hp).compile().as_text()
    sizes = {
        tuple(int(n) for n in dims.split(","))
        for dims in re.findall(r"(?:f32|bf16|f64|s32|pred)\[([\d,]+)\]", text)
    }
    with_vocab = [s for s in sizes if any(n % vocab == 0 for n in s)]
    assert with_vocab, "the head's own buffers must show, or the test looks in the wrong place"
    for size in with_vocab:
        assert np.prod(size) <= vocab * chunk, size


def test_sampler_gap_and_histograms_count_tokens(nano, batch):
    """Diagnostics count each token with a signal once, on the side of its advantage."""
    config, weights = nano
    _, terms = jax.jit(learner.gradient)(weights, batch, settings(config))
    _, values = finish(terms)
    for sign, side in (("pos", batch.advantages > 0), ("neg", batch.advantages < 0)):
        tokens = batch.mask[side].sum()
        for name in ("log_ratio", "gate"):
            assert values[f"histogram/{name}_{sign}"].counts.sum() == tokens
    assert 0 < values["policy/entropy"] <= np.log(VOCAB)
    assert values["sampler/logp_gap_max"] >= values["sampler/logp_gap_mean"] > 0


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.3])
def test_histograms_show_something_at_any_staleness(rng, spread):
    """Bins of 0.01 had all gate weights of a run near its sampler in one, whatever the gate did."""
    log_ratio = jnp.asarray(rng.normal(0, spread, 4000), jnp.float32)
    gate = 1 / jnp.cosh(1.05 * jnp.expm1(log_ratio) / 2) ** 2
    mask = jnp.ones(4000, bool)
    for values, edges in (
        (log_ratio, diagnostics.LOG_RATIO_EDGES), (gate, diagnostics.GATE_EDGES)
    ):  # fmt: skip
        counts = np.asarray(diagnostics.histogram(values, mask, edges).counts)
        assert counts.sum() == 4000
        assert spread < 1e-2 or (counts > 40).sum() >= 8
        assert (counts > 0).sum() >= 3
    exact = diagnostics.histogram(jnp.array([0.0, 1.0]), jnp.ones(2, bool), diagnostics.GATE_EDGES)
    for value in (0, 1):  # silenced tokens, and those that count fully, have a bin of their own
        (place,) = np.flatnonzero(np.diff(value < diagnostics.GATE_EDGES))
        assert exact.counts[place] == 1
        assert np.diff(diagnostics.GATE_EDGES)[place] < 1e-5


def test_recomputed_old_logp_is_bitwise_what_the_update_sees(nano, batch):
    """With the same micro-batches the first ratio is exactly 1, so nothing is clipped."""
    config, weights = nano
    hp = settings(config, micro_batches=2)
    batch = batch.replace(old_logp=learner.score(weights, batch, hp))
    _, terms = jax.jit(learner.gradient)(weights, batch, hp)
    _, values = finish(terms)
    assert abs(float(values["policy/ratio_max"]) - 1) <= 1e-6
    assert abs(float(values["policy/ratio_min"]) - 1) <= 1e-6


def test_what_is_static_and_what_is_traced_are_two_objects(nano):
    """One flat list of names makes and changes both; a leaf of the wrong one would recompile."""
    config, _ = nano
    hp = settings(config, micro_batches=2, router_aux_coef=0.01)
    assert hp.static == learner.Static(config, micro_batches=2, head_chunk=16)
    changed = hp.replace(learning_rate=1e-2, micro_batches=4)
    assert (changed.learning_rate, changed.static.micro_batches) == (1e-2, 4)
    assert changed.static.head_chunk == 16
    assert len(jax.tree.leaves(hp)) == 5 + len(hp.objective.hyperparameters)
    same = hp.replace(learning_rate=1e-2)
    assert jax.tree.structure(same) == jax.tree.structure(settings(
        config, micro_batches=2, router_aux_coef=0.5
    ))  # fmt: skip
    assert jax.tree.structure(same) != jax.tree.structure(changed)
    with pytest.raises(TypeError, match="micro_batch"):
        hp.replace(micro_batch=4)
