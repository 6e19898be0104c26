"""Objectives against golden values, closed forms, finite differences and invariances."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import objectives
from sapo_jax.masked import finish
from sapo_jax.objectives import OBJECTIVES, policy_loss
from sapo_jax.objectives.kl import kl_penalty
from sapo_jax.types import merge
from tests.objectives.programs import coefficients, of_each_token, value_and_gradient

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "goldens/gates.json").read_text())
GRID = np.array(GOLDEN["r_grid"])
DTYPES = [("float32", 1e-6), pytest.param(("float64", 1e-12), marks=pytest.mark.slow)]
OLD = -1.3  # log π_old of every token: anything but 0


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def precision(request):
    """A dtype with the tolerance that it must meet; f64 is computed in f64 throughout."""
    name, tolerance = request.param
    with jax.enable_x64(name == "float64"):
        yield jnp.dtype(name), tolerance


def curve(name, sign, dtype, old=OLD, grid=GRID, **hp):
    """Per-token surrogate, its derivative in r, and c, on the grid of ratios, from the loss."""
    log_ratio = jnp.log(jnp.asarray(grid, dtype))[:, None]
    logp, old = log_ratio + jnp.asarray(old, dtype), jnp.full_like(log_ratio, old)
    (loss, _), gradient = of_each_token(
        objectives.resolve(name, **hp), logp, old, jnp.full(1, sign, dtype), np.ones((1, 1), bool)
    )
    f, c = -sign * np.asarray(loss), -sign * np.asarray(gradient)[:, 0, 0]
    return f, c / grid, c


@pytest.mark.parametrize("tau", GOLDEN["tau_grid"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sapo_matches_the_golden_grid(precision, tau, sign):
    """A gate that forgets 4/τ, uses the wrong sign's τ, or whose σ′ underflows fails here."""
    dtype, tolerance = precision
    other = 7.7
    hp = {"tau_pos": tau, "tau_neg": other} if sign > 0 else {"tau_pos": other, "tau_neg": tau}
    f, w, c = curve("sapo", sign, dtype, **hp)
    golden = [GOLDEN["sapo"][f"{tau}|{r}"] for r in GRID]
    for ours, key in ((f, "f"), (w, "fprime"), (c, "coef")):
        np.testing.assert_allclose(ours, [g[key] for g in golden], rtol=tolerance, atol=tolerance)
    # Relative as well, where exp() is representable: the tails are what `jax.nn.sigmoid` loses.
    finite = np.array([g["fprime"] for g in golden]) > 1e-30
    closed = 1 / np.cosh(tau * (GRID - 1) / 2) ** 2
    np.testing.assert_allclose(w[finite], closed[finite], rtol=100 * tolerance)


def same_tau(half_width):
    """The τ at which a gate of matched width has the κ = 1 of an unmatched one."""
    tau = 2 * np.arccosh(np.sqrt(2)) / half_width
    return {"tau_pos": tau, "tau_neg": tau}


ERF, ARCTAN, SOFTSIGN = (same_tau(w) for w in (np.sqrt(np.log(2)), 1.0, np.sqrt(2) - 1))
TANH = {"tau_pos": 2.0, "tau_neg": 2.0}  # tanh(τ) ≡ sigmoid(2τ)
CAP, NO_ZETA = {"eps_low": 1.0, "eps_high": 0.28}, {"lambda_pos": 1e9, "lambda_neg": 1e9}
OTHER = {  # row of the table: preset, sign of A, what it is, hyperparameters, π_old
    "PPO/GRPO eps=.2 A>0": ("grpo", 1, "w"),
    "PPO/GRPO eps=.2 A<0": ("grpo", -1, "w"),
    "GRPO+dual clip c=3 A<0": ("ppo", -1, "w", {"dual_clip": 3.0}),
    "DAPO .2/.28 A>0": ("dapo", 1, "w"),
    "CISPO coef (1-.2..1+.28 both)": ("cispo", -1, "c", {"eps_low": 0.2, "eps_high": 0.28}),
    "CISPO coef single-sided cap 1.28": ("cispo", 1, "c", CAP),
    "CISPO/ScaleRL cap 5": ("cispo", 1, "c"),
    "P3O tau=4 f": ("p3o", 1, "f", {"kl_coef": 0.0}),
    "P3O tau=4 fprime": ("p3o", 1, "w", {"kl_coef": 0.0}),
    "P3O tau=2 fprime": ("p3o", -1, "w", {"kl_coef": 0.0, "tau": 2.0}),
    "erf_f tau=1": ("sapo_erf", 1, "f", ERF),
    "erf_w tau=1": ("sapo_erf", -1, "w", ERF),
    "atan_f tau=1": ("sapo_arctan", 1, "f", ARCTAN),
    "atan_w tau=1": ("sapo_arctan", -1, "w", ARCTAN),
    "ss_f tau=1": ("sapo_softsign_abs", 1, "f", SOFTSIGN),
    "ss_w tau=1": ("sapo_softsign_abs", -1, "w", SOFTSIGN),
    "tanh_f tau=1": ("sapo", 1, "f − f(1)", TANH),
    "tanh_w tau=1": ("sapo", -1, "w", TANH),
    "erf_w matched to sigmoid tau=1": ("sapo_erf", 1, "w"),
    "atan_w matched to sigmoid tau=1": ("sapo_arctan", 1, "w"),
    "ss_w matched to sigmoid tau=1": ("sapo_softsign_abs", 1, "w"),
    "MASPO w A=1.0 pold=1.0": ("maspo", 1, "w", {}, 1.0),
    "MASPO w A=1.0 pold=0.01": ("maspo", 1, "w", {}, 0.01),
    "MASPO w A=-1.0 pold=1.0": ("maspo", -1, "w", {}, 1.0),
    "MASPO w A=-1.0 pold=0.01": ("maspo", -1, "w", {}, 0.01),
    "MHPO value exp(psi-zeta)": ("mhpo", 1, "f"),
    "MHPO logpi coef": ("mhpo", -1, "c"),
    "MHPO LFM-only coef exp(psi)sech2": ("mhpo", 1, "c", NO_ZETA),
    "VESPO phi A>=0 (2,3)": ("vespo", 1, "c"),
    "VESPO phi A<0 (3,2)": ("vespo", -1, "c"),
}
GSPO = {"GSPO A>0 1{s<=1+4e-4}": 1, "GSPO A<0 1{s>=1-3e-4}": -1}
REFUSED = "TRL cispo epsilon_high=.28 MISCONFIG cap .28"  # ε as an absolute cap


def test_no_row_of_the_golden_table_is_left_out():
    assert {*OTHER, *GSPO, "GSPO s grid", REFUSED} == set(GOLDEN["other"])
    with pytest.raises(ValueError, match="eps_high"):
        objectives.resolve("cispo", eps_high=-0.72)


@pytest.mark.parametrize("row", OTHER)
def test_other_gates_match_the_golden_table(precision, row):
    """Hard gates are one-sided: an unclipped A > 0, r ≪ 1 token must keep its gradient."""
    dtype, tolerance = precision
    name, sign, what, *given = OTHER[row]
    hp, old = given[0] if given else {}, float(np.log(given[1])) if given[1:] else OLD
    f, w, c = curve(name, sign, dtype, old=old, **hp)
    ours = {"f": f, "f − f(1)": f - f[GRID == 1], "w": w, "c": c}[what]
    edge = np.abs(np.abs(GRID - 1) - 0.2) < 1e-9
    keep = ~edge if what == "w" and OBJECTIVES[name].gate is OBJECTIVES["grpo"].gate else GRID > 0
    golden = np.array(GOLDEN["other"][row])
    np.testing.assert_allclose(ours[keep], golden[keep], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("row", GSPO)
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo"])
def test_the_band_of_sequence_ratios(precision, name, row):
    """GSPO's ε are distances of the sequence's ratio from 1, two thousandths of GRPO's."""
    dtype, tolerance = precision
    grid = np.array(GOLDEN["other"]["GSPO s grid"])
    inside = ~np.isclose(grid, 1 - 3e-4) & ~np.isclose(grid, 1 + 4e-4)  # never on an edge
    _, w, _ = curve(name, GSPO[row], dtype, grid=grid)
    golden = np.array(GOLDEN["other"][row])
    np.testing.assert_allclose(w[inside], golden[inside], rtol=tolerance, atol=tolerance)


def toy(dtype):
    given = GOLDEN["toy"]["inputs"]
    log_ratio, advantages = (jnp.asarray(given[k], dtype) for k in ("log_ratio", "adv"))
    return log_ratio, advantages, jnp.asarray(given["mask"]) > 0


TOY = [
    ("sapo", "sapo", {}),
    ("grpo", "grpo_eps0.2", {}),
    ("dapo", "dapo_.2_.28", {}),
    ("cispo", "cispo_cap1.28", {"eps_high": 0.28}),
    ("gspo", "gspo_3e-4_4e-4", {}),
    ("gspo", "gspo_eps0.2", {"eps_low": 0.2, "eps_high": 0.2}),
    ("gspo_token", "gspo_eps0.2", {"eps_low": 0.2, "eps_high": 0.2}),
]


@pytest.mark.parametrize(("name", "key", "hp"), TOY, ids=[f"{n}-{k}" for n, k, _ in TOY])
def test_toy_batch_loss_and_gradient(precision, name, key, hp):
    """Normalisers: 1/|y| for seq_mean, the batch's tokens for token_mean, L_max for const_len."""
    dtype, tolerance = precision
    log_ratio, advantages, mask = toy(dtype)
    old = jnp.full_like(log_ratio, OLD)
    golden = GOLDEN["toy"][key]
    for aggregation in ("seq_mean", "token_mean"):
        objective = dataclasses.replace(OBJECTIVES[name], aggregation=aggregation)
        resolved = objectives.resolve(objective, **hp)
        (loss, _), grad = value_and_gradient(resolved, log_ratio + old, old, advantages, mask)
        np.testing.assert_allclose(grad, golden["dloss_dlogp"][aggregation], atol=tolerance)
        losses = golden.get("loss")
        if isinstance(losses, dict):
            np.testing.assert_allclose(loss, losses[aggregation], atol=tolerance)
        elif losses is not None and aggregation == "seq_mean":
            np.testing.assert_allclose(loss, losses, atol=tolerance)
    if isinstance(golden.get("loss"), dict):
        preset = OBJECTIVES[name]
        hyperparameters = {**preset.hyperparameters, "max_length": 4.0}
        objective = dataclasses.replace(
            preset, aggregation="const_len", hyperparameters=hyperparameters
        )
        resolved = objectives.resolve(objective, **hp)
        (loss, _), _ = value_and_gradient(resolved, log_ratio + old, old, advantages, mask)
        np.testing.assert_allclose(loss, golden["loss"]["const_len_4"], atol=tolerance)


def random_batch(rng, rows=6, width=9, dtype=np.float64):
    logp = rng.normal(-1.5, 0.6, (rows, width)).astype(dtype)
    old = logp + rng.normal(0, 0.3, (rows, width)).astype(dtype)
    length = np.array([9, 4, 1, 0, 7, 5])
    mask = np.arange(width) < length[:, None]
    mask[0, 3] = False  # masks may have holes
    return logp, old, rng.normal(size=rows).astype(dtype), mask


REQUIRED = {"dr_grpo": {"max_length": 9.0}}
NAMES = sorted(OBJECTIVES)
# They differ from another one by their gate or its numbers alone, which the golden tables hold.
LIKE_OTHERS = (
    "sapo_erf", "sapo_arctan", "sapo_softsign", "sapo_softsign_abs", "grpo_r2", "gspo_token",
    "mhpo_unit", "dppo_kl",
)  # fmt: skip
SOME = [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_OTHERS)) for n in NAMES]
# What rows have to do with one another is a matter of the ratio's level and of the average: of each
# such pair, one objective.
PAIRS = {(o.ratio, o.aggregation): n for n, o in sorted(OBJECTIVES.items(), reverse=True)}
ONE_A_PAIR = [pytest.param(n, marks=[pytest.mark.slow] * (n not in PAIRS.values())) for n in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_finite_differences(name, rng):
    """The value and the gradient belong together (f64, away from the kinks).

    Objectives that hold a coefficient fixed by stop-gradient have no such value: for them the
    gradient is compared with −c·A below.
    """
    with jax.enable_x64(True):
        logp, *rest, mask = random_batch(rng)
        objective = objectives.resolve(name, **REQUIRED.get(name, {}))
        grad = np.asarray(value_and_gradient(objective, logp, *rest, mask)[1])
        assert not np.any(grad[~mask])
        if name in ("cispo", "gspo_token", "maspo", "mhpo", "mhpo_unit", "topr", "vespo"):
            return
        direction, step = rng.normal(size=logp.shape), 1e-6
        up, down = (
            value_and_gradient(objective, logp + move * direction, *rest, mask)[0][0]
            for move in (step, -step)
        )
        numeric = (up - down) / (2 * step)
        np.testing.assert_allclose(np.sum(grad * direction), numeric, rtol=1e-6, atol=1e-9)


def divisors(objective, mask):
    """What each token's share of the loss is divided by, [B, 1]."""
    length = mask.sum(-1, keepdims=True)
    sequences = (length > 0).sum()
    return {
        "seq_mean": np.maximum(length, 1) * sequences,
        "token_mean": length.sum(),
        "const_len": sequences * objective.hyperparameters.get("max_length", 0),
        "seq_sum": sequences,
    }[objective.aggregation]


@pytest.mark.parametrize(
    ("name", "spread"),
    [*((n, 1) for n in NAMES), *((n, 100) for n in ("sapo", "grpo", "gmpo", "topr"))],
)
def test_gradient_is_minus_c_a_with_named_normalisers(name, spread, rng):
    """∂loss/∂log π_t = −c_t·A/norm_t with c from the gate's own derivative, also of tokens that
    GMPO clips, and of ratios beyond ±20: of them no gradient is left but of what is no ratio.
    """
    with jax.enable_x64(True):
        logp, old, advantages, mask = random_batch(rng)
        logp = old + spread * (logp - old)
        objective = objectives.resolve(name, **REQUIRED.get(name, {}), kl_coef=0.0)
        c = np.asarray(coefficients(objective, logp, old, advantages, mask))
        (_, metrics), grad = value_and_gradient(objective, logp, old, advantages, mask)
        expected = -c * advantages[:, None] / divisors(objective, mask)
        np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-14)
        silenced = float(np.mean(c[mask] == 0))
        assert metrics["policy/clipped"] == pytest.approx(silenced)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_coefficient_is_one(name, rng):
    """At r = 1 no gate may scale: a surrogate −A·sg(f)·log π would give 2 for SAPO."""
    with jax.enable_x64(True):
        logp, _, advantages, mask = random_batch(rng)
        objective = objectives.resolve(name, **REQUIRED.get(name, {}), kl_coef=0.0)
        _, grad = value_and_gradient(objective, logp, logp, advantages, mask)
        at_one = 0.2650622 if name == "mhpo" else 1.0  # a smaller learning rate in disguise
        expected = -at_one * np.where(mask, advantages[:, None], 0) / divisors(objective, mask)
        np.testing.assert_allclose(grad, expected, rtol=1e-7)


@pytest.mark.parametrize("name", ONE_A_PAIR)
def test_invariances(name, rng):
    """Padding width, row order and packing into segments change neither loss nor gradient."""
    with jax.enable_x64(True):
        logp, old, advantages, mask = random_batch(rng)
        objective = objectives.resolve(name, **REQUIRED.get(name, {}))

        def run(*arrays):
            (loss, _), grad = value_and_gradient(objective, *arrays)
            return loss, grad

        loss, grad = run(logp, old, advantages, mask)

        def wide(x, fill):
            return np.pad(x, ((0, 2), (0, 5)), constant_values=fill)

        padded_loss, padded = run(
            wide(logp, np.nan), wide(old, np.inf), np.pad(advantages, (0, 2)), wide(mask, False)
        )
        np.testing.assert_allclose(padded_loss, loss, rtol=1e-12)
        np.testing.assert_allclose(padded[:6, :9], grad, atol=1e-14)
        order = rng.permutation(6)
        shuffled_loss, shuffled = run(logp[order], old[order], advantages[order], mask[order])
        np.testing.assert_allclose(shuffled_loss, loss, rtol=1e-12)
        np.testing.assert_allclose(shuffled, grad[order], atol=1e-14)
        # Two sequences packed into one row are the same two sequences.
        segments = np.tile(np.repeat([1, 2], 9), (3, 1))
        packed = [x.reshape(3, 18) for x in (logp, old, np.repeat(advantages, 9), mask)]
        packed_loss, packed_grad = run(*packed, segments)
        np.testing.assert_allclose(packed_loss, loss, rtol=1e-12)
        np.testing.assert_allclose(packed_grad.reshape(6, 9), grad, atol=1e-14)


@pytest.mark.parametrize("name", ONE_A_PAIR)
def test_terms_merge_to_the_whole_batch(name, rng):
    """Mean-of-means over micro-batches of unequal lengths is the bug that this excludes."""
    with jax.enable_x64(True):
        logp, old, advantages, mask = (jnp.asarray(x) for x in random_batch(rng))
        objective = objectives.resolve(name, **REQUIRED.get(name, {}))

        @jax.jit
        def whole_and_merged(objective):
            def terms(rows):
                return objectives.policy_terms(
                    objective, logp[rows], old[rows], advantages[rows], mask[rows]
                )

            parts = [terms(slice(0, 1)), terms(slice(1, 4)), terms(slice(4, 6))]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
            return finish(terms(slice(0, 6))), finish(merge(stacked))

        whole, merged = whole_and_merged(objective)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole, merged)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_finite_for_any_ratio_and_for_nan_under_the_mask(name, sign):
    """exp overflows in f32 from a log-ratio of 89; 0·∞ = NaN at padding poisons every weight."""
    extreme = np.array([[np.inf, -np.inf, 1e5, -1e5, 200.0], [88.0, -88.0, 0, np.nan, np.inf]])
    extreme = extreme.astype(np.float32)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    objective = objectives.resolve(name, **REQUIRED.get(name, {}))
    advantages = np.full(2, sign, np.float32)
    for old in (np.zeros_like(extreme), np.where(mask, 0.0, np.nan).astype(np.float32)):
        (loss, _), grad = value_and_gradient(objective, extreme, old, advantages, mask)
        assert np.isfinite(loss)
        assert np.all(np.isfinite(grad))
        assert not np.any(np.asarray(grad)[~mask])


def test_gradient_at_the_clip_bound_is_one_not_a_half():
    """`jnp.clip` and `minimum` split the gradient on a tie; PPO on r = 1 + ε must not."""
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    for sign, eps in ((1.0, {"eps_high": 0.0}), (-1.0, {"eps_low": 0.0})):
        grpo = objectives.resolve("grpo", **eps)
        _, grad = value_and_gradient(grpo, zero, zero, jnp.full(1, sign), one)
        assert float(grad[0, 0]) == -sign


def test_one_executable_for_all_hyperparameters(rng):
    """ε or τ as compile-time constants would recompile at every point of a sweep."""
    logp, old, advantages, mask = random_batch(rng, dtype=np.float32)
    traces = []

    @jax.jit
    def loss(objective):
        traces.append(objective)
        return policy_loss(objective, logp, old, advantages, mask)[0]

    values = [float(loss(objectives.resolve("sapo", tau_pos=t))) for t in (0.5, 1.0, 2.0)]
    assert len(traces) == 1
    assert len(set(values)) == 3
    for eps in (0.1, 0.2, 0.3):
        loss(objectives.resolve("grpo", eps_low=eps, eps_high=eps))
    assert len(traces) == 2


def test_identities(rng):
    """P3O(τ) ≡ SAPO(τ, τ); GSPO ≡ GSPO-token for constant A; SAPO → r·A as τ → 0."""
    with jax.enable_x64(True):
        batch = random_batch(rng)

        def of(name, **hp):
            (loss, _), grad = value_and_gradient(objectives.resolve(name, **hp), *batch)
            return loss, grad

        p3o = of("p3o", tau=1.7, kl_coef=0.0)[1]
        np.testing.assert_allclose(p3o, of("sapo", tau_pos=1.7, tau_neg=1.7)[1], atol=1e-14)
        wide = {"eps_low": 0.5, "eps_high": 0.5}
        for *names, hp, atol in (
            ("sapo", "sapo_quadrant", {}, 1e-15),
            ("gspo", "gspo_token", wide, 1e-14),
        ):
            (loss, grad), (other, other_grad) = (of(name, **hp) for name in names)
            np.testing.assert_allclose(loss, other, rtol=1e-14)
            np.testing.assert_allclose(grad, other_grad, atol=atol)
        plain = of("grpo", eps_low=1.0, eps_high=1e9)[1]
        np.testing.assert_allclose(of("sapo", tau_pos=1e-4, tau_neg=1e-4)[1], plain, rtol=1e-6)


def test_kl_penalty(rng):
    """Values and gradients against closed forms; weights multiply the policy term only."""
    with jax.enable_x64(True):
        logp, old, advantages, mask = random_batch(rng)
        ref = old - 0.2
        weights = rng.uniform(0, 2, logp.shape)
        d = logp - ref
        values = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
        slopes = {"k1": np.ones_like(d), "k2": d, "k3": 1 - np.exp(-d)}
        r = np.exp(logp - old)
        for kind in ("k1", "k3"):
            slopes[f"{kind}_r"] = r * (values[kind] + slopes[kind])
            values[f"{kind}_r"] = r * values[kind]
        length = np.maximum(mask.sum(-1, keepdims=True), 1)
        per_token = mask / length / (mask.sum(-1) > 0).sum()
        plain = policy_loss("sapo", logp, old, advantages, mask, weights_BT=weights)[0]
        for kind, value in values.items():

            def loss(x, kind=kind):
                return policy_loss(
                    "sapo", x, old, advantages, mask,
                    ref_logp_BT=ref, kl=kind, kl_coef=0.3, weights_BT=weights,
                )[0]  # fmt: skip

            expected = plain + 0.3 * np.sum(value * per_token)
            np.testing.assert_allclose(loss(logp), expected, rtol=1e-12)
            no_kl = jax.grad(
                lambda x: policy_loss("sapo", x, old, advantages, mask, weights_BT=weights)[0]
            )(logp)
            np.testing.assert_allclose(
                jax.grad(loss)(logp) - no_kl, 0.3 * slopes[kind] * per_token, atol=1e-13
            )


@pytest.mark.parametrize("estimator", ["k1_r", "k3_r"])
def test_the_corrected_kl_is_unbiased_off_policy(estimator, rng):
    """Over all tokens by their π_old, value and gradient are those of KL(π_θ‖π_ref) itself."""
    with jax.enable_x64(True):
        theta, old, ref = jnp.asarray(rng.normal(size=(3, 7)))

        def estimated(logits):
            logp = [jax.nn.log_softmax(x) for x in (logits, old, ref)]
            return jnp.sum(jnp.exp(logp[1]) * kl_penalty(*logp, estimator))

        def exact(logits):
            logp = jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(ref)))

        found, expected = jax.value_and_grad(estimated)(theta), jax.value_and_grad(exact)(theta)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-10, atol=1e-14)


def test_sapo_coefficient_facts():
    """c = r·w peaks off r = 1: 1.5747 at r = 2.0601 for τ = 1; w = ½ at |r − 1| = 1.7627/τ."""
    with jax.enable_x64(True):
        r = np.linspace(0.01, 6, 60001)
        objective = objectives.resolve("sapo")
        logp = np.log(r)[None]
        mask = np.ones(logp.shape, bool)
        c = np.asarray(coefficients(objective, logp, 0 * logp, np.ones(1), mask))[0]
        assert c.max() == pytest.approx(1.5747, abs=1e-4)
        assert r[c.argmax()] == pytest.approx(2.0601, abs=2e-4)
        w = c / r
        assert r[np.argmin(np.abs(w - 0.5))] == pytest.approx(2.7627, abs=2e-4)


def test_none_means_the_presets_value_and_advantages_may_be_by_token(rng):
    logp, old, advantages, mask = random_batch(rng, dtype=np.float32)
    plain = policy_loss("sapo", logp, old, advantages, mask)[0]
    by_token = np.broadcast_to(advantages[:, None], logp.shape)
    for a, hp in ((advantages, {"tau_pos": None, "kl_coef": None}), (by_token, {})):
        assert float(policy_loss("sapo", logp, old, a, mask, **hp)[0]) == float(plain)
    assert float(policy_loss("sapo", logp, old, advantages, mask, tau_pos=2.0)[0]) != float(plain)


BAD = [
    (("sap",), {}, "sapo"),
    (("sapo",), {"eps_low": 0.1}, "tau_pos, tau_neg"),
    (("sapo",), {"tau_pos": -1.0}, "tau_pos=-1.0"),
    (("sapo",), {"tau_neg": 0.0}, "> 0"),
    (("grpo",), {"eps_high": -0.1}, "eps_high"),
    (("ppo",), {"dual_clip": 0.5}, "dual_clip"),
    (("dr_grpo",), {}, "max_length"),
    (("grpo",), {"kl_coef": 0.1}, "ref_logp"),
    (("sapo",), {"kl": "k4", "ref_logp_BT": jnp.zeros((2, 3))}, "k1, k2, k3"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD)
def test_wrong_arguments_are_refused(args, kwargs, message):
    """Each message names what was wrong and what is allowed."""
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=message):
        policy_loss(*args, x, x, jnp.ones(2), jnp.ones((2, 3), bool), **kwargs)


ARRAYS = {
    "logp_BT": jnp.full((2, 3), -1.0), "old_logp_BT": jnp.full((2, 3), -1.0),
    "advantages_B": jnp.ones(2), "mask_BT": jnp.ones((2, 3), bool),
}  # fmt: skip
BAD_ARRAYS = [
    ({"logp_BT": [[-1.0] * 3] * 2}, "logp is of list: must be an array"),
    ({"logp_BT": jnp.ones(3)}, r"logp has shape \(3,\): must be \[B, T\]"),
    ({"logp_BT": jnp.ones((2, 3), int)}, "logp has dtype int32: .*float32 or float64"),
    ({"old_logp_BT": jnp.ones((1, 3))}, r"old_logp has shape \(1, 3\): must be \(2, 3\)"),
    ({"old_logp_BT": jnp.ones((2, 3), "bfloat16")}, "old_logp has dtype bfloat16: must be float32"),
    ({"advantages_B": jnp.ones(3)}, r"advantages has shape \(3,\): must be \(2,\) or \(2, 3\)"),
    ({"advantages_B": jnp.ones((2, 1))}, r"advantages has shape \(2, 1\)"),
    ({"advantages_B": 1.0}, "advantages is of float: must be an array"),
    ({"advantages_B": np.ones(2, int)}, "advantages has dtype int64: must be float32"),
    ({"mask_BT": jnp.ones((2, 3))}, "mask has dtype float32: must be bool"),
    ({"mask_BT": jnp.ones((2, 3), int)}, "mask has dtype int32: must be bool"),
    ({"mask_BT": jnp.ones(2, bool)}, r"mask has shape \(2,\): must be \(2, 3\)"),
    ({"ref_logp_BT": jnp.ones((2, 4)), "kl_coef": 0.1}, r"ref_logp has shape \(2, 4\)"),
    ({"ref_logp_BT": jnp.ones((2, 3), "float16")}, "ref_logp has dtype float16"),
    ({"kl": "k4"}, "kl='k4': must be one of k1, k2, k3"),
    ({"weights_BT": jnp.ones(2)}, r"weights has shape \(2,\)"),
    ({"weights_BT": -jnp.ones((2, 3))}, "weights has -1.0, -1.0: must be ≥ 0"),
    ({"weights_BT": jnp.full((2, 3), jnp.nan)}, "weights has nan"),
    ({"segments_BT": jnp.ones((2, 3))}, "segments has dtype float32: must be integers"),
    ({"segments_BT": jnp.full((2, 3), 4)}, r"segments has ids from 4 to 4: must be 1\.\.3"),
    ({"segments_BT": jnp.zeros((2, 3), int)}, "ids from 0 to 0: .*under the mask"),
    ({"tau_pos": jnp.ones(2)}, r"tau_pos has shape \(2,\): must be a scalar"),
    ({"tau_pos": "1"}, "tau_pos=1 must be a number > 0"),
    ({"tau_pso": 1.0}, "the nearest is 'tau_pos'"),
    ({"objective": "gpro"}, "the nearest is 'grpo'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS)
def test_arrays_of_other_shapes_dtypes_and_ranges_are_refused(changes, message):
    """Else they broadcast, or are cast, and give a number that is no loss of anything."""
    with pytest.raises(ValueError, match=message):
        policy_loss(**{"objective": "sapo"} | ARRAYS | changes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_refused(dtype):
    """bf16 log-probabilities near −2 carry 1.6% of ratio noise, above GSPO's whole band."""
    x = jnp.zeros((2, 3), dtype)
    with pytest.raises(ValueError, match="float32 or float64"):
        policy_loss("sapo", x, x, jnp.ones(2, dtype), jnp.ones((2, 3), bool))


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="seq_mean, token_mean"):
        dataclasses.replace(OBJECTIVES["grpo"], aggregation="mean")
