"""The gradient lab against brute force: one `jax.grad` per algorithm, closed forms, toy batches."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import gradlab, learner, objectives
from sapo_jax.gradlab import pull, tokens
from sapo_jax.gradlab.fidelity import RESAMPLES, Products, fidelities, noise_scale
from sapo_jax.model import transformer
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.training import bootstrap
from sapo_jax.types import Batch, Seen
from tests import fakes

PROMPTS, G, N, S = 4, 2, 4, 8
NAMES = ["sapo", "grpo", "gspo", "cispo", "luspo"]
ALGORITHMS = {name: OBJECTIVES[name] for name in NAMES}
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "goldens/gates.json").read_text())["toy"]


def rows(rng, count, weights, hp, spread=0.3):
    length = rng.integers(3, S + 1, count)
    length[1] = 2  # no completion
    index = np.arange(S)
    mask = (index >= 2) & (index < length[:, None])
    tokens = rng.integers(2, fakes.VOCAB, (count, S)).astype(np.int32)
    empty = np.zeros((count, S), np.float32)
    segments = (index < length[:, None]).astype(np.int32)
    a = rng.normal(size=count).astype(np.float32)
    batch = jax.device_put(Batch(tokens, mask, segments, empty, empty, a))
    logp = np.asarray(learner.score(weights, batch, hp))
    noise = spread * rng.standard_normal(logp.shape).astype(np.float32)
    return batch.replace(old_logp=jnp.where(mask, logp + noise, 0))


def made(weights, hp, prompts=PROMPTS, **options):
    """The fresh halves have the same rows and rewards that differ a little: they have to agree."""
    rng = np.random.default_rng(5)
    frozen = rows(rng, prompts * G, weights, hp)
    half = rows(rng, prompts * N // 2, weights, hp, 0.0)
    twice = np.tile(np.arange(prompts * N // 2).reshape(prompts, 1, N // 2), (1, 2, 1)).reshape(-1)
    rewards = rng.normal(size=prompts * N // 2)[twice] + 0.3 * rng.normal(size=prompts * N)
    fresh = jax.tree.map(lambda x: x[twice], half)
    rewards = rewards.astype(np.float32)
    return gradlab.Lab(weights, frozen, fresh, rewards, prompts, "group", hp, **options)


@pytest.fixture(scope="module")
def lab(nano):
    config, weights = nano
    hp = learner.Hyperparameters(
        OBJECTIVES["sapo"], 0.0, 0.0, 1.0, 0.9, model=config, head_chunk=16
    )
    return made(weights, hp, tile=4)


def test_rows_with_images_are_refused(lab):
    grids = np.zeros((PROMPTS, 1, 3), np.int32)
    images = Seen(np.zeros((PROMPTS, 1, 1, 8)), grids)
    for field in ("frozen", "fresh"):
        rows = getattr(lab, field).replace(images=images)
        with pytest.raises(ValueError, match=f"{field}.images=Seen: must be None"):
            dataclasses.replace(lab, **{field: rows})


@pytest.fixture(scope="module")
def halves(lab):
    return lab.targets()


@pytest.fixture(scope="module")
def compared(lab, halves):
    return gradlab.compare(lab, halves, ALGORITHMS)


@pytest.fixture(scope="module")
def brute(lab):
    """One `jax.grad` of the plain loss for each algorithm, and for the expected reward's halves."""
    bare = pull.ungated(OBJECTIVES["sapo"])
    token = dataclasses.replace(bare, aggregation="token_mean")
    plain = dataclasses.replace(OBJECTIVES["reinforce"], aggregation="seq_sum")
    named = {"ungated": bare, "ungated_token": token, **ALGORITHMS, "reward": plain}
    every = objectives.switch(named)

    @jax.jit
    def gradient(name, batch):
        def loss(weights):
            logp = learner.forward(weights, batch, lab.hp)[0]
            objective = objectives.resolve(every, index=name)
            given = (logp, batch.old_logp, batch.advantages, batch.mask)
            return objectives.policy_loss(objective, *given, segments_BT=batch.segments)[0]

        return jax.grad(loss)(lab.params)

    *names, reward = range(len(named))
    found = {list(named)[i]: gradient(i, lab.frozen) for i in names}
    rewards = lab.rewards.reshape(PROMPTS, 2, N // 2)
    take = np.arange(PROMPTS * N).reshape(PROMPTS, 2, N // 2)
    for half in range(2):
        mine = rewards[:, half]  # of two samples: leave-one-out is the difference to the other
        chosen = jax.tree.map(lambda x, h=half: x[take[:, h].reshape(-1)], lab.fresh)
        advantages = (mine - mine[:, ::-1]).reshape(-1)
        found[f"half {half}"] = gradient(reward, chosen.replace(advantages=advantages))
    return found


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_norms_and_cosines_are_those_of_brute_force(compared, brute):
    """Two tiles of 4 for 7 gradients: those of different tiles must meet as well."""
    assert compared["names"] == ["ungated", "ungated_token", *NAMES]
    vectors = [flat(brute[name]) for name in compared["names"]]
    norms = [np.linalg.norm(v) for v in vectors]
    np.testing.assert_allclose(compared["norm"]["whole"], norms, rtol=1e-5)
    expected = [[cosine(a, b) for a in vectors] for b in vectors]
    np.testing.assert_allclose(compared["cosine"]["whole"], expected, atol=1e-5)


def test_parts_of_the_model_are_those_of_brute_force(compared, brute, lab):
    parts = {
        "attention": ("q", "k", "v", "o", "q_norm", "k_norm", "attn_norm"),
        "mlp": ("gate", "up", "down", "mlp_norm"),
    }
    for i, name in enumerate(compared["names"]):
        layers = brute[name]["layers"]
        for part, leaves in parts.items():
            norm = np.linalg.norm(flat({k: layers[k] for k in leaves}))
            assert compared["norm"][part][i] == pytest.approx(norm, rel=1e-5)
        for layer in range(lab.hp.static.model.num_hidden_layers):
            norm = np.linalg.norm(flat({k: v[layer] for k, v in layers.items()}))
            assert compared["norm"][f"layer {layer}"][i] == pytest.approx(norm, rel=1e-5)
        top = {k: v for k, v in brute[name].items() if k != "layers"}
        assert compared["norm"]["embedding"][i] == pytest.approx(
            np.linalg.norm(flat(top)), rel=1e-5
        )
    squares = np.square([compared["norm"][p] for p in ("attention", "mlp", "embedding")]).sum(0)
    np.testing.assert_allclose(np.square(compared["norm"]["whole"]), squares, rtol=1e-6)


def test_fidelity_is_that_of_brute_force(compared, brute):
    """Against the expected reward's gradient, both halves of it, and what the gates removed."""
    h1, h2 = flat(brute["half 0"]), flat(brute["half 1"])
    reliability = cosine(h1, h2)
    assert compared["target_halves"][0] == pytest.approx(reliability, abs=1e-5)
    assert reliability > 0.5

    def fidelity(g):
        return (cosine(g, h1) + cosine(g, h2)) / 2 / np.sqrt(reliability)

    def base(name):
        own = objectives.OBJECTIVES.get(name, OBJECTIVES["sapo"]).aggregation
        token = name == "ungated_token" or own != "seq_mean"
        return flat(brute["ungated_token" if token else "ungated"])

    for i, name in enumerate(compared["names"]):
        got = compared["fidelity"]["reward"][i]
        assert got["value"] == pytest.approx(fidelity(flat(brute[name])), abs=1e-5)
        difference = fidelity(flat(brute[name])) - fidelity(base(name))
        assert got["difference"]["value"] == pytest.approx(difference, abs=1e-5)
    for name in ("sapo", "grpo"):  # of token ratios, as ``ungated``
        got = compared["removed"]["reward"][compared["names"].index(name)]
        assert got["value"] == pytest.approx(fidelity(base(name) - flat(brute[name])), abs=1e-4)
    for name in ("ungated", "cispo"):  # no ratio is above CISPO's 5: no more than rounding errors
        i = compared["names"].index(name)
        assert compared["removed"]["reward"][i]["value"] is None
        assert compared["removed"]["mass"][i] == 0


def test_on_policy_no_gate_removes_anything(lab):
    """At r = 1 every ungated objective is the objective, for products over a sequence as well."""
    names = [name for name in OBJECTIVES if name != "mhpo"]  # whose c is 0.265 there
    own = [objectives.resolve(n, **({"max_length": 6.0} if n == "dr_grpo" else {})) for n in names]
    both = (*own, *map(pull.ungated, own))
    batch = lab.frozen
    logp = learner.score(lab.params, batch, lab.hp)
    u = pull.cotangents(both, logp, batch.replace(old_logp=logp))
    np.testing.assert_allclose(u[: len(own)], u[len(own) :], rtol=1e-5, atol=1e-9)


def test_targets_in_smaller_passes(lab, halves):
    """One fresh row at a time: less memory, the same gradients and sketches."""
    passes = dataclasses.replace(lab, max_rows=1).targets()
    for got, expected in zip(passes, halves, strict=True):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, (got.grads, got.sketches), (expected.grads, expected.sketches))


def test_buckets_of_tokens_add_up(lab, halves):
    """Buckets that divide up the tokens carry the whole gradient mass, and lose the whole of it."""
    mask = np.asarray(lab.frozen.mask)
    sides = {"up": lab.frozen.advantages[:, None] > 0, "down": lab.frozen.advantages[:, None] <= 0}
    masks = {name: jnp.asarray(mask & side) for name, side in sides.items()}
    masks |= {"none": jnp.zeros(mask.shape, bool), "all": jnp.asarray(mask)}
    found = gradlab.compare_buckets(lab, halves, OBJECTIVES["sapo"], masks)
    assert found["names"] == ["up", "down", "none", "all"]
    assert found["carried"]["reward"][2]["value"] is None
    *carried, whole = found["carried"]["mass"]
    assert sum(carried) == pytest.approx(1, rel=1e-5) == whole
    *removed, whole = found["removed"]["mass"]
    assert sum(removed) == pytest.approx(whole, rel=1e-5)
    assert 0 < whole < 1


def test_sapo_coefficients_in_closed_form(lab):
    """c = r·sech²(τ(r − 1)/2), τ by the sign of A, token by token."""
    batch = lab.frozen
    logp = learner.score(lab.params, batch, lab.hp)
    c, ratio = tokens.coefficients(OBJECTIVES["sapo"], logp, batch)
    mask = np.asarray(batch.mask)
    r = np.exp(np.asarray(logp) - batch.old_logp)
    tau = np.where(batch.advantages > 0, 1.0, 1.05)[:, None]
    expected = np.where(mask, r / np.cosh(tau * (r - 1) / 2) ** 2, 0)
    np.testing.assert_allclose(c, expected, rtol=1e-5)
    np.testing.assert_allclose(ratio[mask], r[mask], rtol=1e-6)
    length = np.maximum(mask.sum(-1, keepdims=True), 1)
    u = pull.cotangents((OBJECTIVES["sapo"],), logp, batch)[0]
    expected = -expected * batch.advantages[:, None] / length / (mask.sum(-1) > 0).sum()
    np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-9)


def test_sketches_keep_inner_products(lab):
    """The bootstrap rests on them: unbiased, and within a few times 1/√width."""
    logp = learner.score(lab.params, lab.frozen, lab.hp)
    four = tuple(OBJECTIVES[name] for name in ("sapo", "gspo", "luspo", "cispo"))
    u = pull.cotangents(four, logp, lab.frozen)
    ((_, tile),) = lab.tiles(u)
    grads = np.stack([flat(jax.tree.map(lambda x, k=k: x[k], tile.grads)) for k in range(4)])
    sketch = np.asarray(tile.sketches, np.float64).sum(0)
    norm = np.sqrt(np.diag(grads @ grads.T))
    error = (sketch @ sketch.T - grads @ grads.T) / np.outer(norm, norm)
    assert np.abs(error).max() < 5 / np.sqrt(pull.SKETCH)


def planted(rng, noise, prompts=32, size=40):
    """Products of a gradient that is the target plus noise of its own, and of its negative."""
    truth = rng.normal(size=size)
    truth /= np.linalg.norm(truth)

    def noisy():
        return truth + noise * rng.normal(size=(prompts, size)) * np.sqrt(prompts / size)

    a, h1, h2 = noisy(), noisy(), noisy()
    a = np.stack([a, -a, np.zeros_like(a)], 1) / prompts
    h1, h2 = h1[:, None] / prompts, h2[:, None] / prompts
    whole = [x.sum(0) for x in (a, h1, h2)]
    diagonal = lambda x, y: (x * y).sum(-1)  # noqa: E731
    return Products(
        aa=diagonal(whole[0], whole[0]), a1=whole[0] @ whole[1].T, a2=whole[0] @ whole[2].T,
        h11=diagonal(whole[1], whole[1]), h22=diagonal(whole[2], whole[2]),
        h12=diagonal(whole[1], whole[2]), squares=(a**2).sum(-1), sketches=(a, h1, h2),
    )  # fmt: skip


def test_fidelity_divides_out_the_noise_of_the_target():
    """Of a noise-free gradient it is 1 however noisy the target; the interval covers it."""
    rng = np.random.default_rng(0)
    points = []
    for _ in range(40):
        products = planted(rng, 0.7)
        found = fidelities(products, [0, 0, 0], [0, 0, 0])["reward"]
        assert found[1]["value"] == pytest.approx(-found[0]["value"])
        assert found[2]["value"] is None
        assert found[0]["low"] < found[0]["value"] < found[0]["high"]
        points.append(found[0]["value"])
    drawn = fidelities(products, [0, 0, 0], [0, 0, 0], RESAMPLES)["reward"]
    for entry in (drawn[0], drawn[1]["difference"]):
        assert bootstrap.percentiles(np.array(entry["draws"])) == (entry["low"], entry["high"])
    fewer = fidelities(products, [0, 0, 0], [0, 0, 0], 100)["reward"][0]["draws"]
    assert fewer == drawn[0]["draws"][:100]
    # The gradient's own noise stays in: ‖noise‖² = 0.49 of a signal of 1.
    assert np.mean(points) == pytest.approx(1 / np.sqrt(1.49), abs=0.04)


def test_noise_scale_of_a_known_mixture():
    """tr Σ/‖G‖² with tr Σ = noise²·prompts and ‖G‖ = 1."""
    rng = np.random.default_rng(1)
    found = [noise_scale(planted(rng, 0.3))[0] for _ in range(40)]
    assert np.mean(found) == pytest.approx(0.09 * 32, rel=0.1)


def test_sequence_gates_of_the_toy_batch():
    """Var_i, D_log and its bound, and D of the real gate, which exceeds the bound."""
    log_ratio, mask = (np.array(GOLDEN["inputs"][key]) for key in ("log_ratio", "mask"))
    for i, tau in enumerate((1.0, 1.05)):
        found = tokens.gate_spread(log_ratio, mask > 0, tau)[i]
        expected = {
            "variance": (0.1125, 0.030625), "d_log": (0.02579054, 0.00825092),
            "bound": (0.028125, 0.00844102), "d_actual": (0.05176942, 0.00521229),
        }  # fmt: skip
        for key, values in expected.items():
            assert found[key] == pytest.approx(values[i], abs=1e-7), key


def test_collision_is_that_of_the_softmax(lab):
    batch = lab.frozen
    hidden, _ = transformer.hidden(lab.params, lab.hp.static.model, batch.tokens, batch.segments)
    logits = transformer.logits_of(lab.params, lab.hp.static.model, hidden) / lab.hp.temperature
    square = np.square(jax.nn.softmax(logits)).sum(-1)
    expected = np.where(batch.mask, np.pad(square[:, :-1], ((0, 0), (1, 0))), 0)
    np.testing.assert_allclose(tokens.collision(lab.params, batch, lab.hp), expected, rtol=1e-5)


def test_token_statistics(lab):
    """Counts cover the tokens with a signal; GSPO drops whole sequences, SAPO none."""
    wide = lab.frozen
    found = tokens.describe(ALGORITHMS, lab.params, wide, lab.hp)
    count = int(np.asarray(wide.mask).sum())
    assert found["tokens"] == count
    for name in NAMES:
        sides = found["algorithms"][name]["histograms"]
        assert sum(sum(side["w"]) for side in sides.values()) == count
        assert sum(sum(side["c"]) for side in sides.values()) == count
    assert found["algorithms"]["cispo"]["silenced"] == 0
    assert found["algorithms"]["gspo"]["silenced"] > found["algorithms"]["grpo"]["silenced"] > 0
    assert found["algorithms"]["gspo"]["dropped_sequences"] > 0
    assert found["algorithms"]["sapo"]["dropped_sequences"] == 0
    assert 0 < found["ess"]["product W"] < found["ess"]["token ratio r"] < 1
    assert found["algorithms"]["sapo"]["logits"]["negative"]["spread"] > 1
    json.dumps(found)


@pytest.mark.slow
def test_on_eight_devices():
    """`eight_devices.py`, in a process whose CPU counts as eight devices."""
    fakes.on_eight_devices("tests/gradlab/eight_devices.py")


def test_deciles_hold_a_tenth_each():
    values, mask = np.arange(200.0).reshape(20, 10), np.ones((20, 10), bool)
    counts = np.bincount(tokens.deciles(values, mask).reshape(-1))
    assert counts.tolist() == [20] * 10
