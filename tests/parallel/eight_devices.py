"""Meshes of eight devices against one; run by `test_sharding` in a process that has them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives, sampler, train
from sapo_jax.masked import finish
from sapo_jax.model import lora, params, transformer
from sapo_jax.model.config import VisionConfig
from sapo_jax.parallel import sharding
from sapo_jax.sampler import Plan, decode, decode_state, sampling
from sapo_jax.sampler.weights import partition_specs
from sapo_jax.training import checkpoint, parameters, settings, startup
from sapo_jax.training.engine import Streamed
from sapo_jax.training.workdir import read_metrics
from sapo_jax.types import Batch, Frozen
from tests import fakes, tiny_config

P, N, G, T = 16, 5, 4, 8
VOCAB = 520  # three blocks of the two-stage draw; a quarter of it is no whole number of blocks
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4, data 2": {"tensor": 4, "data": 2},
    "expert 4, fsdp 2": {"expert": 4, "fsdp": 2},
}
KINDS = {"dense": ("nano", "gspo", {}), "moe": ("nano_moe", "sapo", {})}
MORE = [  # combined elsewhere
    ("dense", "data 8"), ("dense", "fsdp 8"), ("dense", "expert 4, fsdp 2"),
    ("moe", "data 8"), ("moe", "fsdp 8"), ("moe", "tensor 4, data 2"),
]  # fmt: skip


def case(kind, name, *rest):
    return pytest.param(kind, name, *rest, marks=[pytest.mark.slow] * ((kind, name) in MORE))


CASES = [case(kind, name) for kind in KINDS for name in MESHES]
ROLLOUTS = [
    *(case(kind, name, {}) for kind in KINDS for name in MESHES),
    ("dense", "fsdp 8", {"tensor": 4, "data": 2}),
    case("moe", "data 8", {"tensor": 2, "expert": 4}),
]


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def policies():
    def policy(preset):
        config = model.make(
            preset, vocab_size=VOCAB, num_key_value_heads=4, stop_tokens=(1, 7, 11, 40),
            max_position_embeddings=64,
        )  # fmt: skip
        return config, fakes.perturbed(jax.jit(params.init, static_argnums=0)(config, 0))

    return {kind: policy(preset) for kind, (preset, *_) in KINDS.items()}


def placed(policy, mesh):
    config, weights = policy
    if mesh is None:
        return weights
    return jax.device_put(weights, params.shardings(config, mesh))


def roll(policy, mesh, own=None, **kw):
    """Half of the prompts wait for a slot; on the learner's mesh, or from it on one of its own."""
    config, weights = policy[0], placed(policy, mesh)
    options = {"plan": Plan((8,), (T,), 8), "temperature": 1.0, **kw}
    if own:
        mesh = sharding.reshape(mesh, **own)
        weights = sampler.to_sampler(weights, config, mesh)
    rollout = sampler.rollout(
        weights, config, fakes.prompts(P, N), group_size=G, max_new_tokens=T,
        seed=11, iteration=3, **options,
    )  # fmt: skip
    if mesh is not None:
        assert len(rollout.tokens.sharding.device_set) == 8
        assert rollout.tokens.addressable_shards[0].data.shape[0] == P * G / sharding.parts(mesh)
    return jax.device_get(rollout)


@pytest.fixture(scope="module")
def references(policies):
    return {kind: roll(policy, None) for kind, policy in policies.items()}


def batch_of(rollout):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=rollout.tokens.shape).astype(np.float32)
    advantages = rng.normal(size=len(rollout.tokens)).astype(np.float32)
    return Batch(
        rollout.tokens, rollout.mask, rollout.segments, rollout.sampler_logp,
        rollout.sampler_logp + 0.05 * noise, advantages, routing=rollout.routing,
    )  # fmt: skip


def hyperparameters(config, objective, mesh, **kw):
    """With Adam's usual eps, the first step of a gradient near rounding would be noise."""
    return learner.Hyperparameters(
        objectives.resolve(objective), 1e-4, 0.1, 1e9, 1.0, model=config, mesh=mesh,
        micro_batches=2, head_chunk=32, eps=1e-6, **kw,
    )  # fmt: skip


def updated(policy, batch, hp):
    """Loss and metrics, the gradient, the parameters after one update, and the program's text."""
    state = learner.init(jax.tree.map(jnp.copy, placed(policy, hp.static.mesh)), hp)
    batch = sharding.place(batch, hp.static.mesh)
    update = learner.update.lower(state, batch, hp).compile()
    state, terms = update(state, batch, hp)
    loss, metrics = finish(terms)
    # Adam's first moment after one step from 0, without clipping.
    gradient = jax.tree.map(
        lambda m: np.asarray(m) / np.float32(1 - hp.static.b1), state.opt_state[1].mu
    )
    if hp.static.mesh is not None:
        want = jax.tree.map(lambda x: x.sharding, learner.abstract(hp))
        assert jax.tree.map(lambda x: x.sharding, state) == want, "the next update would compile"
    numbers = {k: np.asarray(v) for k, v in metrics.items() if not k.startswith("histogram")}
    return {"loss": np.asarray(loss), **numbers}, gradient, jax.device_get(state.params), update


def agree(got, expected):
    metrics, gradient, weights, _ = got
    for key, value in expected[0].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradient, expected[1]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), weights, expected[2])


@pytest.fixture(scope="module")
def on_one(policies, references):
    """One update on one device, computed once for each kind of model and replay."""
    done = {}

    def compute(kind, **kw):
        key = (kind, *kw.items())
        if key not in done:
            hp = hyperparameters(policies[kind][0], KINDS[kind][1], None, **kw)
            done[key] = updated(policies[kind], batch_of(references[kind]), hp)
        return done[key]

    return compute


def collectives(compiled):
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_update_agrees_with_one_device(policies, references, on_one, kind, name):
    """Loss, metrics, gradient and parameters; GSPO (dense) needs whole sequences on a device.

    A sum that is taken twice or not at all, over any axis, is off by a factor.
    """
    mesh = sharding.make_mesh(**MESHES[name])
    hp = hyperparameters(policies[kind][0], KINDS[kind][1], mesh)
    got = updated(policies[kind], batch_of(references[kind]), hp)
    agree(got, on_one(kind))
    counts = collectives(got[-1])
    split = sum(
        "fsdp" in str(spec) for spec in jax.tree.leaves(params.partition_specs(policies[kind][0]))
    )  # fmt: skip
    if name == "data 8":
        assert counts.pop("all-reduce") > 0
        assert not any(counts.values()), counts
    if name == "fsdp 8":  # once forward and once backward; gradients once
        times = policies[kind][0].num_hidden_layers if kind == "dense" else 1  # the others scan
        assert 0 < counts["all-gather"] <= 2 * split * times
        assert 0 < counts["reduce-scatter"] <= split * times


@pytest.mark.slow
def test_replayed_routing_and_its_balance_agree_with_one_device(policies, references, on_one):
    """Experts of the sampler on the devices that hold them, and fractions over all rows."""
    options = {"routing_replay": "R3", "router_aux_coef": 0.1, "remat": True}
    mesh = sharding.make_mesh(**MESHES["expert 4, fsdp 2"])
    hp = hyperparameters(policies["moe"][0], "sapo", mesh, **options)
    got = updated(policies["moe"], batch_of(references["moe"]), hp)
    agree(got, on_one("moe", **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("dense", {"fsdp": 2, "tensor": 4}), ("moe", {"expert": 2, "fsdp": 2, "tensor": 2})],
)
def test_an_update_of_adapters_agrees_with_one_device(policies, references, kind, sizes):
    """Of the factors of an adapter one is split over `tensor`, the other's gradient is a sum.

    On the mesh the sampler draws by the same adapters, and the learner agrees with it.
    """
    shape, base = policies[kind]
    targets = lora.targets((), params.layer_table(shape))
    config = dataclasses.replace(shape, lora_rank=3, lora_targets=targets)
    adapters, found = fakes.perturbed(params.init(config, 1), 0.05), []
    batch = batch_of(references[kind])
    for mesh in (None, sharding.make_mesh(**sizes)):
        options = {"lora_scale": 2.0, "remat": kind == "moe"}
        hp = hyperparameters(config, KINDS[kind][1], mesh, **options)
        frozen, own = Frozen(base), jax.tree.map(jnp.copy, adapters)
        if mesh is not None:
            specs = params.partition_specs(config)
            frozen = jax.device_put(frozen, sharding.shardings(mesh, lora.frozen(specs, config)))
            own = jax.device_put(own, sharding.shardings(mesh, lora.trained(specs, config)))
        state, placed_batch = learner.init(own, hp), sharding.place(batch, mesh)
        policy = lora.join(own, frozen, hp.lora_scale)
        rows = sampler.rollout(
            policy, config, fakes.prompts(P, N), group_size=G, max_new_tokens=T, temperature=1.0,
            seed=11, iteration=3, plan=Plan((8,), (T,), 8),
        )  # fmt: skip
        drawn = sharding.place(batch_of(jax.device_get(rows)), mesh)
        logp = np.asarray(learner.score(own, drawn, hp, frozen))
        gap = np.abs(logp - np.asarray(rows.sampler_logp))[np.asarray(rows.mask)]
        assert gap.max() < 1e-4
        state, terms = learner.update(state, placed_batch, hp, frozen)
        gradient = jax.tree.map(lambda m: np.asarray(m) / np.float32(0.1), state.opt_state[1].mu)
        loss, metrics = finish(terms)
        numbers = {k: np.asarray(v) for k, v in metrics.items() if not k.startswith("histogram")}
        found.append(({"loss": np.asarray(loss), **numbers}, gradient, state.params, None))
    agree(found[1], found[0])


TOWER = VisionConfig(
    2, 32, 64, 4, num_position_embeddings=25, deepstack_visual_indexes=(0,), patch_size=2,
    mrope_section=(2, 3, 3), image_token_id=20,
)  # fmt: skip


def seeing(**fields):
    return model.make(
        "nano_moe", vocab_size=VOCAB, num_key_value_heads=4, model_type="qwen3_vl_moe",
        vision=TOWER, stop_tokens=(1, 7, 11, 40), max_position_embeddings=64, **fields,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", list(MESHES))
def test_a_policy_that_sees_samples_and_learns_as_on_one_device(name, trained):
    """Rows are packed and dealt to other devices than their images; the tower's gradient, too.

    The sampler's features are those of the learner, wherever each computes them.
    """
    config, rng = seeing(train_vision=trained), np.random.default_rng(3)
    weights, prompts = fakes.weights(config), fakes.prompts(P, N + 6)
    tokens, length = prompts.tokens.copy(), prompts.length.copy()
    tokens[tokens == 20] = 21
    grids = np.zeros((P, 2, 3), np.int32)
    for p in range(0, P, 2):  # every second one is of text alone
        tokens[p, 1 : 1 + 4 + p // 8], length[p] = 20, max(length[p], 6 + p // 8)
        grids[p] = [[1, 4, 4], [1, 2, 2 * (p // 8)] if p >= 8 else [0, 0, 0]]
    tokens = np.where(np.arange(N + 6) < length[:, None], np.where(tokens == 0, 3, tokens), 0)
    patches = rng.normal(size=(P, 24, TOWER.patch_dim)).astype(np.float32)
    images, found = model.vision.Images(patches, grids), []
    prompts = prompts.replace(tokens=tokens, length=length, images=images)
    for mesh in (None, sharding.make_mesh(**MESHES[name])):
        own, frozen = lora.trained(weights, config), lora.frozen(weights, config)
        if mesh is not None:
            specs = params.partition_specs(config)
            own = jax.device_put(own, sharding.shardings(mesh, lora.trained(specs, config)))
            if frozen:
                rest = sharding.shardings(mesh, lora.frozen(specs, config))
                frozen = jax.device_put(frozen, rest)
        rows = sampler.rollout(
            lora.join(own, frozen, None), config, prompts, group_size=G, max_new_tokens=T,
            temperature=1.0, seed=11, iteration=3, plan=Plan((8,), (T,), 8),
        )  # fmt: skip
        shown = images if trained else jax.device_get(rows.images)
        found.append((mesh, own, frozen, jax.device_get(rows), shown))
    (*_, rows, _), results = found[0], []
    np.testing.assert_allclose(found[1][3].images.features, rows.images.features, atol=1e-4)
    lengths = np.repeat(length, G), rows.mask.sum(-1)
    for mesh, own, frozen, _, shown in found:
        parts = sharding.parts(mesh)
        shape = learner.packed_shape(P * G, N + 6, T, group_size=G, budget=64, parts=parts)
        hp = hyperparameters(config, "sapo", mesh).replace(micro_batches=shape.micro_batches)
        layout = learner.plan(*lengths, N + 6 + T, shape)
        batch = sharding.place(batch_of(rows).replace(images=shown, routing=None), mesh)
        batch = learner.pack(batch, layout, mesh=mesh)
        logp = learner.unpack(learner.score(own, batch, hp, frozen), layout, mesh=mesh)
        gap = np.abs(np.asarray(logp) - rows.sampler_logp)[rows.mask]
        assert gap.max() < 1e-4
        grads, terms = jax.jit(learner.gradient)(own, batch, hp, frozen)
        loss, _ = finish(terms)
        results.append(({"loss": np.asarray(loss)}, jax.device_get(grads), {}, None))
    agree(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MESHES))
def test_a_model_that_sees_agrees_with_one_device(name):
    """Hidden states, and the gradient of every parameter of tower and decoder."""
    tower, config = TOWER, seeing()
    weights, rng = fakes.weights(config), np.random.default_rng(3)
    tokens = rng.integers(30, VOCAB, (8, 9))
    tokens[:, 2:6] = 20
    patches = rng.normal(size=(8 * 16, tower.patch_dim)).astype(np.float32)
    images = model.vision.Images(patches, np.array([[1, 4, 4]] * 8, np.int32))

    def local(weights, tokens, images):
        def loss(weights):
            whole = params.all_gather(weights, params.table(config), config)
            sight = model.vision.look(whole, config, tokens, images)
            hidden, _ = transformer.hidden(
                whole, config, tokens, jnp.ones_like(tokens), remat=True, sight=sight
            )
            return jnp.sum(hidden * jnp.cos(jnp.arange(hidden[0].size).reshape(hidden[0].shape)))

        grads, sight = jax.grad(loss)(weights), model.vision.look(weights, config, tokens, images)
        return params.psum_gradients(grads, config), jnp.moveaxis(sight.features, 0, 1)

    found = []
    for mesh in (None, sharding.make_mesh(**MESHES[name])):
        specs = params.partition_specs(config)
        rows = sharding.spec("rows")
        run = sharding.shard_map(local, mesh, (specs, rows, rows), (specs, rows))
        own = weights if mesh is None else jax.device_put(weights, params.shardings(config, mesh))
        found.append(jax.device_get(jax.jit(run)(own, *sharding.place((tokens, images), mesh))))
    (plain, features), (grads, others) = found
    np.testing.assert_allclose(others, features, atol=1e-5 * np.abs(features).max())
    for path, want in jax.tree_util.tree_leaves_with_path(plain):
        got = grads
        for key in path:
            got = got[key.key]
        atol = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=atol, err_msg=jax.tree_util.keystr(path))


def near_tie(policy, rollout, row, at):
    """The gap of the draw at a token: between the two best blocks, or in the chosen one."""
    config, weights = policy
    prompt, sample = row // G, row % G
    logits = model.logits(weights, config, jnp.asarray(rollout.tokens[row])[None])[0, at - 1]
    base = sampling.base_key(np.uint32(11), "train", 3)
    prompts = fakes.prompts(P, N)
    key = sampling.row_keys(base, jnp.asarray(prompts.id[prompt : prompt + 1]), G)[0, sample]
    outer, inner = jax.random.split(jax.random.fold_in(key, at - int(prompts.length[prompt])))
    blocks = jnp.pad(logits, (0, -VOCAB % sampling.BLOCK), constant_values=-jnp.inf)
    blocks = blocks.reshape(-1, sampling.BLOCK)
    mass = jax.nn.logsumexp(blocks, -1)
    mass = mass + jax.random.gumbel(outer, mass.shape)
    inside = blocks[jnp.argmax(mass)] + jax.random.gumbel(inner, (sampling.BLOCK,))
    first, second = (np.sort(np.asarray(x)) for x in (mass, inside))
    return min(first[-1] - first[-2], second[-1] - second[-2])


def near_expert(policy, rollout, row, at):
    """The smallest distance at the k-th place of a router, over layers and earlier tokens."""
    config, weights = policy
    tokens = jnp.asarray(rollout.tokens[row, :at])[None]
    _, probs = transformer.hidden(
        weights, config, tokens, jnp.ones_like(tokens), summarise=lambda r: r.probs
    )
    best, k = np.sort(np.asarray(probs), -1), config.num_experts_per_tok
    return (best[..., -k] - best[..., -k - 1]).min()


@pytest.mark.parametrize(("kind", "name", "own"), ROLLOUTS)
def test_rollouts_agree_up_to_near_ties(policies, references, kind, name, own):
    """Slots, caches and the vocabulary split: the same noise, the same rows, the same experts."""
    mesh, policy, expected = sharding.make_mesh(**MESHES[name]), policies[kind], references[kind]
    got = roll(policy, mesh, own)
    assert expected.mask.sum() > 300
    differs = np.flatnonzero((got.tokens != expected.tokens).any(-1))
    assert len(differs) <= 0.01 * len(got.tokens)
    for row in differs:
        at = int(np.argmax(got.tokens[row] != expected.tokens[row]))
        close = near_tie(policy, expected, row, at) < 1e-3
        assert close or (kind == "moe" and near_expert(policy, expected, row, at) < 1e-4)
    same = np.setdiff1d(np.arange(len(got.tokens)), differs)
    for field in ("mask", "segments", "finished", "prompt_id", "sample_index"):
        np.testing.assert_array_equal(getattr(got, field)[same], getattr(expected, field)[same])
    np.testing.assert_allclose(got.sampler_logp[same], expected.sampler_logp[same], atol=2e-5)
    if kind == "moe":
        assert (got.routing[same] != expected.routing[same]).mean() < 1e-3
    # Without parameters only the noise decides.
    blank = (policy[0], jax.tree.map(np.zeros_like, policy[1]))
    np.testing.assert_array_equal(roll(blank, mesh, own).tokens, roll(blank, None).tokens)


@pytest.mark.slow
def test_slots_shrink_and_caches_grow_in_every_part(policies, references):
    """Parts of the rows finish at different times; each group is reported once, with its tokens."""
    mesh = sharding.make_mesh(**MESHES["tensor 4, data 2"])
    seen = {}

    def on_groups(index, tokens, count, finished):
        for prompt, *rows in zip(index, tokens, count, strict=True):
            assert prompt not in seen
            seen[prompt] = rows

    got = roll(
        policies["dense"], mesh, plan=Plan((4, 2, 2), (3, T), 2, (2, 2, 1)), on_groups=on_groups
    )
    np.testing.assert_array_equal(got.tokens, references["dense"].tokens)
    assert sorted(seen) == list(range(P))
    for row in range(P * G):
        tokens, count = (x[row % G] for x in seen[row // G])
        np.testing.assert_array_equal(got.tokens[row][got.mask[row]], tokens[:count])


@pytest.mark.slow
def test_greedy_and_truncated_draws_look_at_the_whole_vocabulary(policies):
    mesh = sharding.make_mesh(**MESHES["tensor 4, data 2"])
    for options in ({"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "domain": "eval"}):
        got, expected = (roll(policies["dense"], m, **options) for m in (mesh, None))
        assert (got.tokens != expected.tokens).any(-1).mean() <= 0.01


def test_the_learner_scores_what_the_sampler_drew(policies, references):
    """The gap between sampler and learner on a mesh, by both of its columns of the table."""
    config, rollout = policies["dense"][0], references["dense"]
    mesh = sharding.make_mesh(**MESHES["tensor 4, data 2"])
    hp = hyperparameters(config, "sapo", mesh)
    batch = sharding.place(batch_of(rollout), mesh)
    logp = np.asarray(learner.score(placed(policies["dense"], mesh), batch, hp))
    assert np.abs(logp - rollout.sampler_logp)[rollout.mask].max() <= 1e-5


def test_to_sampler_moves_what_changes_place(policies):
    config, _ = policies["dense"]
    for name, kept in (("data 8", ("embed", "final_norm")), ("fsdp 8", ())):
        weights = placed(policies["dense"], sharding.make_mesh(**MESHES[name]))
        fast = sampler.to_sampler(weights, config)
        for key in kept:
            assert fast[key] is weights[key]
        everything = 8 * sum(x.nbytes for x in jax.tree.leaves(fast))
        moved = everything - 8 * sum(weights[key].nbytes for key in kept)
        assert sampler.moved_bytes(weights, fast) == moved
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(fast))


@pytest.mark.parametrize("kind", KINDS)
def test_to_sampler_of_another_mesh_places_as_the_table_says(policies, kind):
    """As on one device, to the bit; no parameter that the mesh splits lies whole on a device."""
    config, _ = policies[kind]
    mesh = sharding.make_mesh(**MESHES["expert 4, fsdp 2"])
    own = sharding.reshape(mesh, data=4, tensor=2)
    fast = sampler.to_sampler(placed(policies[kind], mesh), config, own)
    alone = sampler.to_sampler(policies[kind][1], config)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (fast, alone)))
    expected = sharding.shardings(own, partition_specs(config))
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), fast, expected)
    assert jax.tree.all(same), same
    assert not fast["layers"][0]["q"].sharding.is_fully_replicated


def test_decoding_gathers_no_weights(policies):
    """Of all that travels between devices while decoding, nothing is larger than the rows."""
    config, _ = policies["moe"]
    mesh = sharding.make_mesh(**MESHES["expert 4, fsdp 2"])
    weights = sampler.to_sampler(placed(policies["moe"], mesh), config)
    state = decode_state.empty(config, decode_state.Shape(8, G, T, P, N, G, T), mesh)
    arguments = (sampling.controls(1.0), state, np.int32(9), np.full(16, 1, np.int32), np.int32(1))
    compiled = decode.decode.lower(
        weights, config, *arguments, truncate=False, mesh=mesh
    ).compile()  # fmt: skip
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in gathered]
    assert sizes
    assert max(sizes) <= 8 * G * config.hidden_size
    assert jax.tree.structure(partition_specs(config)) == jax.tree.structure(weights)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path, no_plots):
    """Trained on 2×4, resumed there, on 8×1 and on one device: the next update is the same."""
    fields = {"iterations": 1, "eval.every": 0, "batch.minibatches": 1, "sampler.slots": 0}

    def resolved(**mesh):
        config = tiny_config.get_config()
        with config.unlocked():
            config.update_from_flattened_dict(fields | {f"mesh.{k}": v for k, v in mesh.items()})
        return settings.from_config(config)

    trained = resolved(data=2, fsdp=4)
    train.run(trained, tmp_path)
    rng = np.random.default_rng(0)
    shape = (trained.rows, trained.width + trained.max_new_tokens)
    index = np.arange(shape[1])
    batch = Batch(
        rng.integers(2, trained.model.vocab_size, shape).astype(np.int32),
        np.broadcast_to(index > 3, shape),
        np.ones(shape, np.int32),
        *rng.normal(-3, 0.3, (2, *shape)).astype(np.float32),
        rng.normal(size=shape[0]).astype(np.float32),
    )
    results = []
    for mesh in ({"data": 2, "fsdp": 4}, {"data": -1}, {}):
        checked = resolved(**mesh)
        with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
            (bundle,), _ = startup.start([Streamed(checked)], checkpoints)
        assert int(bundle.state.iteration) == 1
        _, terms = learner.update(bundle.state, sharding.place(batch, checked.mesh), checked.hp)
        loss, metrics = finish(terms)
        numbers = {k: v for k, v in metrics.items() if not k.startswith("histogram")}
        results.append(jax.device_get({"loss": loss, **numbers}))
    for other in results[1:]:
        for key, value in results[0].items():
            np.testing.assert_allclose(other[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_a_run_samples_on_a_mesh_of_its_own(tmp_path, no_plots):
    """Of fewer parts than the learner's, so that fewer slots will do; the metrics are the same."""
    fields = {"iterations": 1, "eval.every": 0, "batch.minibatches": 1, "sampler.slots": 4}
    records = []
    for i, mesh in enumerate(({}, {"mesh.fsdp": 8, "sampler.mesh.tensor": 2})):
        config = tiny_config.get_config()
        config.update_from_flattened_dict(fields | mesh)
        train.run(settings.from_config(config), tmp_path / str(i))
        records += read_metrics(tmp_path / str(i))
    for key in ("reward/mean", "length/mean", "grad/norm"):
        np.testing.assert_allclose(records[1][key], records[0][key], rtol=1e-5, err_msg=key)


WRONG = [
    (
        {"mesh.fsdp": 8, "sampler.mesh.tensor": 3},
        "config.sampler.mesh: data=-1, .*tensor=3 does not",
    ),
    ({"mesh.fsdp": 8, "sampler.mesh.tensor": 8}, "config.sampler.mesh: .*'kv_heads' of size"),
    ({"mesh.fsdp": 8, "sampler.mesh.data": 8}, "sampler.slots: axis 'rows' of size 4"),
    ({"mesh.fsdp": 8, "sampler.mesh.tensor": -2}, "tensor=-2: must be at least 1"),
    ({"sampler.mesh.tensor": 2}, "config.sampler.mesh=.*tensor=2.* must be 0 along all axes"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_mesh_of_the_sampler_that_cannot_be_is_refused(fields, message):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"batch.minibatches": 1} | fields)
    with pytest.raises(ValueError, match=message):
        settings.from_config(config)


def test_random_parameters_are_those_of_one_device():
    """They are drawn in parts, each where it belongs."""
    drawn = []
    for mesh in ({}, {"mesh.fsdp": 8, "sampler.slots": 0}):
        config = tiny_config.get_config()
        config.update_from_flattened_dict(mesh)
        drawn.append(parameters.random(settings.from_config(config)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *drawn)
