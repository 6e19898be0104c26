"""Prompts with images: sampled, scored and learnt from, whatever the layout of rows and images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives, sampler
from sapo_jax.learner import scores
from sapo_jax.model import images, lora, params, vision
from sapo_jax.sampler import Plan
from sapo_jax.sampler.images import seen
from sapo_jax.types import Batch, Images, Prompts, Seen
from tests import fakes

VOCAB, IMAGE, G, T, N = 40, 30, 3, 8, 16
TOWER = model.config.VisionConfig(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, num_position_embeddings=9,
    deepstack_visual_indexes=(0,), patch_size=2, mrope_section=(4, 2, 2), image_token_id=IMAGE,
    video_token_id=31, vision_start_token_id=32, vision_end_token_id=33,
)  # fmt: skip
SHOWN = [[(2, 3), (1, 2)], [], [(2, 2)], [(1, 1), (1, 1), (3, 1)], [(2, 3)], []]  # of each prompt


DENSE = pytest.param("qwen3_vl", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["qwen3_vl_moe", DENSE])
def policy(request):
    preset = "nano_moe" if "moe" in request.param else "nano"
    config = model.make(
        preset, vocab_size=VOCAB, num_hidden_layers=2, hidden_size=32, intermediate_size=48,
        model_type=request.param, vision=TOWER, stop_tokens=(1, 4),
    )  # fmt: skip
    return config, fakes.weights(config, 0.15)


def shown(order=(0, 1, 2, 3, 4, 5), seed=0):
    """Prompts with none to three images each, in an order; images are of all, row by row."""
    rng = np.random.default_rng(seed)
    rows, pictures = [], []
    for grids in SHOWN:
        row, own = rng.integers(5, 29, 2).tolist(), []
        for height, width in grids:
            row += [32, *[IMAGE] * (height * width), 33]
            own.append(
                (rng.normal(size=(height * width * 4, TOWER.patch_dim)), (1, 2 * height, 2 * width))
            )
        rows.append(row + rng.integers(5, 29, 1).tolist())
        pictures.append(own)
    tokens = np.zeros((len(rows), N), np.int32)
    for i, p in enumerate(order):
        tokens[i, : len(rows[p])] = rows[p]
    every = [picture for p in order for picture in pictures[p]]
    patches = np.concatenate([patches for patches, _ in every]).astype(np.float32)
    grids = np.array([grid for _, grid in every], np.int32)
    length = np.array([len(rows[p]) for p in order], np.int32)
    ids = np.array([100 + p for p in order], np.uint32)
    return Prompts(tokens, length, ids, length * 0, images=Images(patches, grids))


def roll(policy, prompts, plan=None, temperature=1.0):
    config, weights = policy
    return jax.device_get(
        sampler.rollout(
            weights, config, prompts, group_size=G, max_new_tokens=T,
            temperature=temperature, seed=3, iteration=1, plan=plan,
        )
    )  # fmt: skip


def settings_of(config, **options):
    numbers = 1e-2, 0.0, 1e9, 1.0
    return learner.Hyperparameters(
        objectives.resolve("sapo"), *numbers, model=config, head_chunk=64, **options
    )


def batch_of(rollout, images, seed=0):
    rng = np.random.default_rng(seed)
    made = Batch(
        rollout.tokens, rollout.mask, rollout.segments, rollout.sampler_logp,
        rollout.sampler_logp, rng.normal(size=len(rollout.tokens)).astype(np.float32),
        images=images,
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def rolled(policy):
    prompts = shown()
    by_row = images.by_row(prompts.images, prompts.tokens, policy[0])
    return prompts, by_row, roll(policy, prompts)


def test_decoding_equals_teacher_forcing(policy, rolled):
    """By the learner's score, and by `model.logits` of rows with copies of their images: the G
    completions share cache, images and the delta of positions (ms-swift #9287)."""
    config, weights = policy
    _, by_row, rollout = rolled
    assert rollout.mask.sum() > 60
    scored = learner.score(weights, batch_of(rollout, by_row), settings_of(config))
    gap = np.abs(scored - rollout.sampler_logp)[rollout.mask]
    assert gap.max() <= 1e-5
    kept = learner.score(weights, batch_of(rollout, rollout.images), settings_of(config))
    assert np.abs(kept - scored).max() <= 1e-6
    row, own = 3 * G + 1, by_row.grids[3]
    one = Images(by_row.patches[3], own)
    logits = model.logits(weights, config, rollout.tokens[row : row + 1], images=one)[0]
    logp = np.asarray(jax.nn.log_softmax(logits))
    at = np.flatnonzero(rollout.mask[row])
    want = logp[at - 1, rollout.tokens[row, at]]
    np.testing.assert_allclose(rollout.sampler_logp[row, at], want, atol=1e-5)


@pytest.mark.slow
def test_order_slots_and_pads_change_nothing(policy, rolled):
    """Prompts in another order, few slots, larger arrays of images: the same rows (trl #5785)."""
    prompts, by_row, rollout = rolled
    order = [4, 3, 5, 0, 2, 1]
    other = roll(policy, shown(order), plan=Plan((3, 2), (T,), 1, (2, 1)))
    back = (np.argsort(order)[:, None] * G + np.arange(G)).ravel()
    np.testing.assert_array_equal(other.tokens[back], rollout.tokens)
    np.testing.assert_allclose(other.sampler_logp[back], rollout.sampler_logp, atol=1e-5)
    wider = Images(
        np.pad(by_row.patches, ((0, 0), (0, 8), (0, 0)), constant_values=7),
        np.pad(by_row.grids, ((0, 0), (0, 2), (0, 0))),
    )
    again = roll(policy, prompts.replace(images=wider))
    np.testing.assert_array_equal(again.tokens, rollout.tokens)


def test_images_of_two_prompts_swapped(policy, rolled):
    """What is sampled depends on the image of the own prompt, and on no other."""
    prompts, by_row, rollout = rolled
    other = by_row.patches.copy()
    other[2] = other[2][::-1]
    found = roll(policy, prompts.replace(images=by_row.replace(patches=other)))
    differs = np.abs(found.sampler_logp - rollout.sampler_logp).max(-1) > 1e-4
    assert differs[2 * G : 3 * G].all()
    assert not np.delete(differs, range(2 * G, 3 * G)).any()


def gradients(config, weights, batch, frozen=None, **options):
    hp = settings_of(config, **options)
    return jax.device_get(jax.jit(learner.gradient)(weights, batch, hp, frozen))


def close(got, want, scale=1e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        atol = scale * max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(x, y, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_packed_rows_and_micro_batches_are_the_plain_ones(policy, rolled):
    """Prompts once for their completions, rows dealt to micro-batches in any order."""
    config, weights = policy
    prompts, by_row, rollout = rolled
    batch = batch_of(rollout, by_row)
    grads, terms = gradients(config, weights, batch)
    shape = learner.packed_shape(6 * G, N, T, group_size=G, budget=64)
    assert shape.micro_batches > 2
    lengths = np.repeat(prompts.length, G), rollout.mask.sum(-1)
    packed = learner.pack(batch, learner.plan(*lengths, N + T, shape))
    found, others = gradients(config, weights, packed, micro_batches=shape.micro_batches)
    close(found, grads)
    np.testing.assert_allclose(others["loss"].numerator, terms["loss"].numerator, rtol=1e-5)


@pytest.mark.slow
def test_gradients_reach_the_tower_unless_it_is_frozen(policy, rolled):
    """Learnt: every parameter, by one backward pass of the tower behind all micro-batches. Frozen:
    none, the tower is not run again, and weight decay does not touch it."""
    config, weights = policy
    _, by_row, rollout = rolled
    grads, _ = gradients(config, weights, batch_of(rollout, by_row))

    def loss(weights):  # the same by plain differentiation through one program
        hp = settings_of(config)
        batch = batch_of(rollout, by_row)
        found = vision.features(weights, config, by_row)
        kept = batch.replace(images=rollout.images.replace(features=found))
        logp = scores.map_rows(lambda *x: scores.forward(*x)[0], weights, kept, hp)
        terms = objectives.policy_terms(
            hp.objective, logp, batch.old_logp, batch.advantages, batch.mask
        )
        return terms["loss"].numerator / terms["loss"].denominator

    close(grads["vision"], jax.device_get(jax.jit(jax.grad(loss))(weights)["vision"]))
    for path, grad in jax.tree.leaves_with_path(grads["vision"]):
        name = jax.tree_util.keystr(path)
        if "qkv_bias" in name:
            grad = np.delete(grad, 1, axis=1)
        assert np.abs(grad).max() > 1e-6, name
    shape = dataclasses.replace(config, train_vision=False)
    own, rest = lora.trained(weights, shape), lora.frozen(weights, shape)
    assert "vision" not in own
    assert list(rest.params) == ["vision"]
    text = {name: x for name, x in grads.items() if name != "vision"}
    found, _ = gradients(shape, own, batch_of(rollout, rollout.images), rest)
    close(found, text)
    hp = settings_of(shape).replace(weight_decay=0.1)
    state = learner.init(jax.tree.map(jnp.array, own), hp)
    runs = {}
    for shown in (rollout.images, by_row):  # the only function with an exact GELU is the tower
        lowered = learner.update.lower(state, batch_of(rollout, shown), hp, rest)
        runs[type(shown)] = "erf" in lowered.as_text()
    assert runs == {type(rollout.images): False, Images: True}
    state, _ = learner.update(state, batch_of(rollout, rollout.images), hp, rest)
    assert jax.tree.structure(state.params) == jax.tree.structure(own)


@pytest.mark.slow
def test_adapters_beside_a_tower(policy, rolled):
    """LoRA leaves the tower as it is; the rollout of joined parameters sees the same."""
    config, weights = policy
    _, by_row, rollout = rolled
    found = lora.targets((), params.layer_table(config))
    shape = dataclasses.replace(config, lora_rank=2, lora_targets=found)
    own = params.init(shape, 0)
    rest = lora.frozen(weights | {"layers": {**weights["layers"], **own["layers"]}}, shape)
    hp = settings_of(shape, lora_scale=1.0)
    scored = learner.score(own, batch_of(rollout, rollout.images), hp, rest)
    assert np.abs(scored - rollout.sampler_logp)[rollout.mask].max() <= 1e-5
    state, _ = learner.update(learner.init(own, hp), batch_of(rollout, by_row), hp, rest)
    assert list(state.params) == ["layers"]


def test_a_sampled_placeholder_is_text(policy):
    """A policy that writes the placeholder itself changes no slot of an image."""
    config, _ = policy
    tokens = np.array([[5, 32, *[IMAGE] * 4, 33, 6, IMAGE, IMAGE, 7, 0]], np.int32)
    grids, ones = np.array([[[1, 4, 4]]], np.int32), np.ones_like(tokens)
    shown = Seen(np.zeros((1, 1, 4, 8)), grids)
    slots = vision._slots(tokens, config, shown, np.zeros((1, 1), np.int32), ones)
    np.testing.assert_array_equal(slots[0], [4, 4, 0, 1, 2, 3, 4, 4, 4, 4, 4, 4])


def test_bad_images_are_refused(policy):
    prompts = shown()
    text = dataclasses.replace(policy[0], model_type="qwen3", vision=None, num_experts=0)
    with pytest.raises(ValueError, match="model_type='qwen3' sees none"):
        seen(policy[1], text, prompts, None)
    tokens = prompts.tokens.copy()
    tokens[1, 0] = IMAGE
    with pytest.raises(ValueError, match=r"placeholders .* must be equal"):
        seen(policy[1], policy[0], prompts.replace(tokens=tokens), None)
    tokens[0, np.argmax(tokens[0] == IMAGE)] = 5
    with pytest.raises(ValueError, match="row 0 has 7 placeholders for 8 tokens"):
        seen(policy[1], policy[0], prompts.replace(tokens=tokens), None)
