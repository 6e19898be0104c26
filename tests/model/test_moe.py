"""Experts: equal to a loop over them for any routing, by matmuls that follow the routed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import model
from sapo_jax.model import grouped, grouped_triton, moe, waves
from sapo_jax.preflight import costs, hlo

E, K, D, F = 8, 2, 16, 32
CONFIG = model.make(
    "nano_moe", vocab_size=23, hidden_size=D, num_experts=E, moe_intermediate_size=F
)


def make_weights(rng, d=D, f=F, e=E):
    shapes = {"experts_gate": (e, d, f), "experts_up": (e, d, f), "experts_down": (e, f, d)}
    weights = {k: rng.normal(size=s).astype(np.float32) / 4 for k, s in shapes.items()}
    return weights | {"router": rng.normal(size=(d, e)).astype(np.float32)}


def apply(weights, hidden, experts, config=CONFIG):
    """Layer output and nothing else, with the experts forced if given."""
    routing = moe.route(hidden, weights["router"], config, experts)
    return moe.experts(weights, config, hidden, routing)


def loop(weights, hidden, experts):
    """Every expert on every token, weighted by its gate or 0."""
    probs = jax.nn.softmax(jnp.matmul(hidden, weights["router"], precision="highest"))
    chosen = jnp.sum(jax.nn.one_hot(experts, E), -2)
    gates = probs * chosen / jnp.sum(probs * chosen, -1, keepdims=True)
    out = 0
    for e in range(E):
        w = {k: weights[k][e] for k in ("experts_gate", "experts_up", "experts_down")}
        inner = jax.nn.silu(hidden @ w["experts_gate"]) * (hidden @ w["experts_up"])
        out = out + gates[:, e : e + 1] * (inner @ w["experts_down"])
    return out


def choices(kind, tokens, rng):
    """Expert ids [T, K], distinct within a token."""
    if kind == "random":
        return np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    first = {"all on one": 3, "first": 0, "last": E - 1}[kind]
    return np.tile([first, (first + 1) % E], (tokens, 1))


@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_values_and_gradients_equal_a_loop_over_experts(tokens, rng):
    """A capacity limit drops tokens when all choose one expert; here none may be lost."""
    weights = make_weights(rng)
    hidden, cotangent = rng.normal(size=(2, tokens, D)).astype(np.float32)

    def run(function):
        def total(w, h, ids):
            out = function(w, h, ids)
            return jnp.sum(out * cotangent), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    with jax.default_matmul_precision("highest"):
        runs = run(apply), run(loop)
        for kind in ("random", "all on one", "first", "last"):
            ids = choices(kind, tokens, rng).astype(np.int32)
            got, expected = (f(weights, hidden, ids) for f in runs)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
            assert float(jnp.abs(expected[1][0]["router"]).max()) > 1e-4


def close(got, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("few", "rank"),
    [(8, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4096, 0), (8, 3)))],
)
def test_devices_with_some_of_the_experts_add_up(few, rank, rng, monkeypatch):
    """In one wave or in many, as when all tokens choose experts of one device; with adapters."""
    devices, tokens, place = 4, 130, None
    monkeypatch.setattr(waves, "FEW", few)
    monkeypatch.setattr(moe.collectives, "axis_size", lambda axis: devices)
    monkeypatch.setattr(moe.collectives, "axis_index", lambda axis: place)
    made = make_weights(rng)
    weights = [(made[f"experts_{name}"],) for name in ("gate", "up", "down")]
    for i, (matrix,) in enumerate(weights if rank else ()):
        sizes = (E, matrix.shape[1], rank), (E, rank, matrix.shape[2])
        weights[i] += tuple(rng.normal(0, 0.2, size).astype(np.float32) for size in sizes)
    weights = tuple(weights)
    hidden, cotangent = rng.normal(size=(2, tokens, D)).astype(np.float32)
    gates = rng.uniform(size=(tokens, K)).astype(np.float32)

    def gradient(compute):
        def total(w, h, gates, ids, index):
            nonlocal place
            place = index
            return jnp.sum(compute(w, CONFIG, h, ids, gates) * cotangent)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))

    whole, part, here = gradient(moe._of_all), gradient(moe._of_this_device), E // devices
    for kind in ("random", "all on one", "last"):
        ids, parts = choices(kind, tokens, rng).astype(np.int32), []
        for index in range(devices):
            own = jax.tree.map(lambda w, i=index: w[i * here : (i + 1) * here], weights)
            parts.append(part(own, hidden, gates, ids, index))
        d_weights, *others = zip(*(grads for _, grads in parts), strict=True)
        d_weights = jax.tree.map(lambda *x: jnp.concatenate(x), *d_weights)
        got = sum(value for value, _ in parts), (d_weights, *map(sum, others))
        expected = whole(weights, hidden, gates, ids, 0)
        jax.tree.map(close, got, expected)


def test_every_routed_pair_has_a_row_of_its_own(rng):
    for tokens in (1, 7, 64, 600):
        for kind in ("random", "all on one"):
            ids = choices(kind, tokens, rng).astype(np.int32)
            plan = jax.jit(grouped.layout, static_argnums=1)(ids, E)
            position = np.asarray(plan.position)
            assert len(np.unique(position)) == ids.size
            block = len(plan.source) // len(plan.expert)
            np.testing.assert_array_equal(np.asarray(plan.expert)[position // block], ids)
            np.testing.assert_array_equal(
                np.asarray(plan.source)[position], np.arange(tokens)[:, None] + 0 * ids
            )
            padding = np.asarray(plan.source) == tokens
            assert padding.sum() == len(padding) - ids.size


@pytest.mark.parametrize("share", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_executed_flops_follow_the_routed_rows(share, rng):
    """Forward and backward ≤ 1.15 × the routed matmuls; dense dispatch would be E/k = 4 ×."""
    d, f, tokens = 64, 128, share * E // K
    config = model.make(
        "nano_moe", vocab_size=23, hidden_size=d, num_experts=E, moe_intermediate_size=f
    )
    weights = make_weights(rng, d, f)
    hidden = rng.normal(size=(tokens, d)).astype(np.float32)

    def total(w, h):
        return jnp.sum(apply(w, h, None, config) ** 2)

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(weights, hidden).compile()
    routed = tokens * K * 3 * 2 * d * f * 3
    router = tokens * E * d * 2 * 3
    assert routed + router <= costs.flops(hlo.parse(compiled.as_text())) <= 1.15 * routed + router
    rows = len(grouped.layout(np.zeros((tokens, K), np.int32), E).source)
    # A matrix for each block would be 5 times that at 64 tokens an expert.
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * rows * f * 4


def test_a_program_for_tpu_uses_megablox():
    """Chosen by the platform that the program is compiled for, not by the present machine."""
    x, w = jnp.ones((128, 128)), jnp.ones((2, 128, 128))
    arguments = x, w, jnp.arange(2), jnp.array([64, 64])
    grad = jax.jit(jax.grad(lambda *a: grouped.grouped_matmul(*a).sum(), (0, 1)))
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
        traced = grad.trace(*arguments)
        texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    kernels = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
    for kernel in kernels.values():
        assert {p for p, text in texts.items() if kernel in text} == {
            p for p in texts if kernels.get(p) == kernel
        }


MEGABLOX = grouped._by_megablox, grouped._weight_gradient_by_megablox
TRITON = grouped_triton.multiply, grouped_triton.weight_gradient


@pytest.mark.parametrize(("multiply", "weight_gradient"), [MEGABLOX, TRITON])
def test_kernels_agree_with_blocks(multiply, weight_gradient, rng):
    """Those of other platforms, interpreted here."""
    ids = choices("random", 40, rng).astype(np.int32)
    plan = grouped.layout(ids, E, 16)
    x = rng.normal(size=(len(plan.source), D)).astype(np.float32)
    y = rng.normal(size=(len(plan.source), F)).astype(np.float32)
    w = rng.normal(size=(E, D, F)).astype(np.float32)
    used = int(plan.sizes.sum())
    rest = plan.expert, plan.sizes
    forward = multiply(x, w, *rest, interpret=True)
    np.testing.assert_allclose(forward[:used], grouped._by_blocks(x, w, *rest)[:used], atol=1e-4)
    back = multiply(y, w, *rest, transpose=True, interpret=True)
    expected = grouped._by_blocks(y, w, *rest, transpose=True)
    np.testing.assert_allclose(back[:used], expected[:used], atol=1e-4)
    y[used:] = 0
    d_w = weight_gradient(x, y, *rest, interpret=True)
    np.testing.assert_allclose(d_w, grouped._weight_gradient_by_blocks(x, y, *rest), atol=1e-4)


def test_the_router_decides_in_f32(rng):
    """bf16 hidden states, f32 logits: near-ties must not depend on the compute dtype's rounding."""
    weights = make_weights(rng)
    hidden = jnp.bfloat16(rng.normal(size=(50, D)))
    routing = moe.route(hidden, weights["router"], CONFIG)
    exact = np.asarray(hidden, np.float64) @ np.float64(weights["router"])
    np.testing.assert_array_equal(routing.own, np.argsort(-exact, kind="stable")[:, :K])
    assert routing.probs.dtype == routing.gates.dtype == jnp.float32
    np.testing.assert_allclose(routing.gates.sum(-1), 1, atol=1e-6)


def test_replayed_experts_get_gates_of_the_present_router(rng):
    weights = make_weights(rng)
    hidden = rng.normal(size=(6, D)).astype(np.float32)
    forced = np.array([[5, 1], [-1, -1]] * 3, np.int8)
    routing = moe.route(hidden, weights["router"], CONFIG, forced)
    own = moe.route(hidden, weights["router"], CONFIG)
    np.testing.assert_array_equal(routing.experts[::2], forced[::2])
    np.testing.assert_array_equal(routing.experts[1::2], own.experts[1::2])
    probs = np.asarray(own.probs)[0, [5, 1]]
    np.testing.assert_allclose(routing.gates[0], probs / probs.sum(), rtol=1e-6)
