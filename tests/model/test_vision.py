"""Models that see: recorded ones, what depends on which image, checkpoints in both layouts."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sapo_jax import model
from sapo_jax.model import blocked, params, splash, transformer, vision
from sapo_jax.types import Images, Seen
from tests.model.test_hf import close
from tests.oracles import drawn, seen

ORACLES = pathlib.Path(__file__).parents[1] / "oracles" / "vision"
CASES = sorted(path.stem for path in ORACLES.glob("*.npz"))


def write_recorded(name, directory, *, as_on_the_hub=False):
    """The recorded model as a directory; what was recorded of it."""
    with np.load(ORACLES / f"{name}.npz") as file:
        recorded = dict(file)
    shapes = json.loads(str(recorded["shapes"]))
    weights = {key: drawn.tensor(key, shape) for key, shape in shapes.items()}
    if as_on_the_hub:
        for key in [key for key in weights if ".experts." in key]:
            weights[key] = np.ascontiguousarray(weights[key].swapaxes(1, 2))
    (directory / "config.json").write_text(str(recorded["config"]))
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    return recorded


def shown(name, recorded, pads=(0, 0)):
    """Rows and images of a case, with pads behind the patches and the images."""
    tokens, mask, grids, patches = seen.rows(name, json.loads(str(recorded["vision"])))
    padded = [np.pad(x, ((0, n), (0, 0))) for x, n in zip((patches, grids), pads, strict=True)]
    return tokens, mask, Images(padded[0], padded[1].astype(np.int32)) if len(grids) else None


@jax.jit(static_argnums=1)
def _run(weights, config, tokens_BS, images, segments_BS, prefix_BS):
    if images is None:
        return (
            None,
            model.logits(weights, config, tokens_BS),
            *vision.positions(tokens_BS, config, None),
        )
    features = vision.features(weights, config, images)
    slots = vision._in_order(tokens_BS, config, features, images.grids).slots
    seen = Seen(features[None], images.grids[None])
    sight = vision._sight(seen, config, slots, segments_BS, prefix_BS)
    hidden, _ = transformer.hidden(
        weights, config, tokens_BS, segments_BS, prefix_BS=prefix_BS, sight=sight
    )
    positions, delta = vision.positions(tokens_BS, config, images)
    found = positions if prefix_BS is None else sight.positions
    return features, transformer.logits_of(weights, config, hidden), found, delta


def run(weights, config, tokens_BS, images, segments_BS=None, prefix_BS=None):
    """(features, logits, positions, delta) by the parts that the learner uses."""
    segments_BS = np.ones_like(tokens_BS) if segments_BS is None else segments_BS
    return jax.device_get(_run(weights, config, tokens_BS, images, segments_BS, prefix_BS))


@pytest.mark.parametrize("name", CASES)
def test_recorded_models(name, tmp_path):
    """Logits, features of each level, positions and deltas are those of transformers."""
    recorded = write_recorded(name, tmp_path)
    config, weights = model.hf.load(tmp_path)
    m = config.vision.merged
    tokens, mask, images = shown(name, recorded, (3 * m, 2))
    features, logits, positions, delta = run(weights, config, tokens, images)
    close(logits[mask], recorded["logits"][mask], 1e-5)
    if images is not None:
        count = recorded["features"].shape[1]
        assert len(features) == len(recorded["features"])
        for got, want in zip(features, recorded["features"], strict=True):
            close(got[:count], want, 1e-5)
    np.testing.assert_array_equal(positions[:, mask], recorded["positions"][:, mask])
    np.testing.assert_array_equal(delta, recorded["delta"])


def test_there_are_enough_recordings():
    assert len(CASES) >= 8
    shapes = {len(row) for name in CASES for row in seen.ROWS.get(name, seen.ROWS["dense"])}
    assert shapes >= {0, 1, 2, 3}


@pytest.mark.parametrize("name", [name for name in CASES if "moe" in name])
def test_both_layouts_of_experts(name, tmp_path):
    """Also where a tensor of a layer is square, which says nothing about its layout."""
    for folder, as_on_the_hub in (("new", False), ("hub", True)):
        (tmp_path / folder).mkdir()
        write_recorded(name, tmp_path / folder, as_on_the_hub=as_on_the_hub)
    config, weights = model.hf.load(tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, model.hf.load(tmp_path / "hub")[1], weights)
    model.hf.save(tmp_path / "out", config, weights, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = model.hf.load(tmp_path / "out")
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], weights)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= safetensors.numpy.load_file(file)
    # Where transformers would take the hub's for its own, its own is written.
    same = tmp_path / ("new" if "square" in name else "hub") / "model.safetensors"
    original = safetensors.numpy.load_file(same)
    assert written.keys() == original.keys()
    jax.tree.map(np.testing.assert_array_equal, written, original)


def test_save_and_load(tmp_path):
    """Dense, in bf16 and sharded files; limits of the processor are carried along."""
    recorded = write_recorded("tied_one_kv_head", tmp_path)
    size = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))
    config, weights = model.hf.load(tmp_path, dtype="bfloat16")
    assert (config.vision.min_pixels, config.vision.max_pixels) == (64, 4096)
    model.hf.save(tmp_path / "out", config, weights, shard_bytes=20_000)
    again = model.hf.load(tmp_path / "out", dtype="bfloat16")
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], weights)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["vision_config"].items() >= json.loads(str(recorded["vision"])).items()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    recorded = write_recorded("dense", directory)
    config, weights = model.hf.load(directory)
    return config, weights, shown("dense", recorded)


def test_text_alone_is_qwen3_to_the_bit(policy):
    """Without images; and rows without them among others, to rounding."""
    config, weights, (tokens, _, images) = policy
    text = dataclasses.replace(config, model_type="qwen3", vision=None)
    own = {name: value for name, value in weights.items() if name != "vision"}
    logits = jax.jit(model.logits, static_argnums=1)
    plain = logits(own, text, tokens)
    np.testing.assert_array_equal(logits(weights, config, tokens), plain)
    among = logits(weights, config, tokens, images=images)
    close(among[1], plain[1], 1e-6)
    assert np.abs(among[0] - plain[0]).max() > 0.1 * np.abs(plain).max()


def test_images_belong_to_their_placeholders(policy):
    """Two images of a batch swapped with their rows, and pads: only the order changes. One image
    replaced: its row changes from there on, the others do not (trl #5785, #6401, #6274)."""
    config, weights, (tokens, mask, images) = policy
    features, logits, *_ = run(weights, config, tokens, images)
    count = np.prod(images.grids, -1)
    parts = np.split(images.patches, np.cumsum(count))[:3]
    pads = np.full((8, images.patches.shape[1]), 7, np.float32)
    order = [2, 0, 1]  # of images: the last row comes first
    swapped = Images(
        np.concatenate([*(parts[i] for i in order), pads]),
        np.concatenate([images.grids[order], np.zeros((3, 3), np.int32)]),
    )
    moved, others, *_ = run(weights, config, tokens[[2, 0, 1]], swapped)
    close(others[[1, 2, 0]][mask], logits[mask], 1e-6)
    tokens_of = np.split(np.arange(features.shape[1]), np.cumsum(count // 4))[:3]
    found = moved[:, : features.shape[1]]
    close(found, features[:, np.concatenate([tokens_of[i] for i in order])], 1e-6)
    changed = Images(np.concatenate([parts[0], parts[1] + 1, parts[2]]), images.grids)
    other, seen_logits, *_ = run(weights, config, tokens, changed)
    differs = np.abs(other - features).max((0, 2)) > 1e-3
    np.testing.assert_array_equal(differs, np.isin(np.arange(len(differs)), tokens_of[1]))
    first = np.flatnonzero(tokens[0] == seen.IMAGE)[6]
    differs = np.abs(seen_logits - logits).max(-1) > 1e-3
    assert not differs[1:].any()
    assert not differs[0, :first].any()
    assert differs[0, first : mask[0].sum()].all()


def test_gradients_reach_every_parameter_of_the_tower(policy):
    """Deepstack mergers among them; by the path of the learner, which recomputes."""
    config, weights, (tokens, mask, images) = policy

    def loss(weights):
        sight = vision.look(weights, config, tokens, images)
        segments = mask.astype(np.int32)
        hidden, _ = transformer.hidden(weights, config, tokens, segments, remat=True, sight=sight)
        return jnp.sum(jnp.where(mask[..., None], hidden, 0) ** 2 * jnp.arange(32))

    grads = jax.device_get(jax.jit(jax.grad(loss))(weights)["vision"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        per_layer = grad.reshape(len(grad), -1) if "blocks" in name or "deep" in name else grad
        if "qkv_bias" in name:  # what is added to all keys changes no softmax
            per_layer = np.delete(grad, 1, axis=1).reshape(len(grad), -1)
        assert np.all(np.abs(per_layer).max(-1) > 0) or "positions" in name, name
        assert np.abs(grad).max() > 1e-3, name


def test_packed_rows_share_a_prompt_with_its_image(policy):
    """Prompt once, two completions after it: the logits and positions of rows of their own."""
    config, weights, (tokens, _, images) = policy
    one = Images(images.patches[:24], images.grids[:1])
    prompt, first, second = tokens[0, :11], tokens[0, 11:14], tokens[2, 6:8]
    assert np.sum(prompt == seen.IMAGE) == 6
    first, second = (
        np.where(first == seen.IMAGE, 9, first),
        np.where(second == seen.IMAGE, 9, second),
    )
    packed = np.concatenate([prompt, first, second, [2]])[None]
    segments = np.repeat([1, 2, 3, 0], [11, 3, 2, 1])[None].astype(np.int32)
    prefix = np.repeat([0, 1, 1, 0], [11, 3, 2, 1])[None].astype(np.int32)
    _, logits, positions, _ = run(weights, config, packed, one, segments, prefix)
    two = Images(np.concatenate([one.patches] * 2), np.concatenate([one.grids] * 2))
    rows = np.stack([np.append(prompt, first), np.append(prompt, [*second, 2])])
    _, alone, own, _ = run(weights, config, rows, two)
    close(logits[0, :14], alone[0], 1e-5)
    close(logits[0, 14:16], alone[1, 11:13], 1e-5)
    np.testing.assert_array_equal(positions[:, 0, :14], own[:, 0])
    np.testing.assert_array_equal(positions[:, 0, 14:16], own[:, 1, 11:13])


@pytest.mark.parametrize("kernel", ["blocked", "splash"])
def test_attention_within_a_segment(kernel, rng):
    """Values and gradients are those of a plain softmax; nothing leaks between segments."""
    q, k, v = rng.normal(size=(3, 1, 300, 2, 8)).astype(np.float32)
    segments = np.repeat([1, 2, 3, 0], [150, 20, 100, 30])[None].astype(np.int32)
    weight = rng.normal(size=q.shape).astype(np.float32) * (segments > 0)[..., None, None]
    same = segments[:, None, :, None] == segments[:, None, None]

    def plain(q, k, v, segments):
        scores = jnp.einsum("bshd,bthd->bhst", q, k, precision="highest") / jnp.sqrt(8)
        scores = jax.nn.softmax(jnp.where(same, scores, -1e30), -1)
        return jnp.einsum("bhst,bthd->bshd", scores, v, precision="highest")

    def both(function):
        total = lambda *x: jnp.sum(function(*x, segments) * weight)  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    options = {"whole": True} | ({"interpret": True} if kernel == "splash" else {})
    attend = {"blocked": blocked, "splash": splash}[kernel].causal
    found = both(lambda *x: attend(*x, **options))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(both(plain)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_no_scores_of_all_patches_are_kept(policy):
    """Of an image of 1024 patches no array has 1024² entries, in the gradient neither."""
    config, weights, _ = policy
    images = Images(np.zeros((1024, 24), np.float32), np.array([[1, 32, 32]], np.int32))
    loss = lambda w: jnp.sum(vision.features(w, config, images))  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(weights))
    assert "1024,32" in text
    assert "1024,1024" not in text


def changed(part, **fields):
    def change(content):
        (content[part] if part else content).update(fields)

    return change


BAD = {
    "act": (changed("vision_config", hidden_act="relu"), "vision_config.hidden_act='relu'"),
    "out": (changed("vision_config", out_hidden_size=7), "out_hidden_size=7 .* must be 32"),
    "turns": (changed("vision_config", rope_parameters={"rope_theta": 5.0}), "'rope_theta': 5.0"),
    "heads": (changed("vision_config", num_heads=3), "num_heads=3: times a multiple of 4"),
    "taps": (changed("vision_config", deepstack_visual_indexes=[2, 1]), "must rise, in"),
    "deep": (changed("vision_config", deepstack_visual_indexes=[9]), r"in \[0, depth=3\)"),
    "square": (changed("vision_config", num_position_embeddings=24), "must be a square"),
    "patch": (changed("vision_config", patch_size=[2, 2]), r"patch_size=\[2, 2\]: must be"),
    "null": (changed("vision_config", depth=None), r"missing: model.visual.blocks"),
    "huge": (changed("vision_config", depth=2**31 - 1), r"depth=2147483647: must be .*\[1, 4096"),
    "token": (changed("", image_token_id=61), "image_token_id=61: must be below 61"),
    "part": (changed("", vision_config=3), "vision_config=3: must be an object"),
    "plain": (
        changed("text_config", rope_parameters={"mrope_interleaved": False}),
        "mrope_interleaved=False is not supported",
    ),
    "sections": (
        changed("text_config", rope_parameters={"mrope_section": [4, 2, 3]}), "with the sum 8"
    ),
    "depth": (changed("vision_config", depth=4), "missing: model.visual.blocks.3"),
    "window": (changed("vision_config", patch_size=4), "weight is .* must be .*32, 3, 2, 4, 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_this_model_is_refused(name, tmp_path):
    harm, message = BAD[name]
    content = json.loads(str(write_recorded("dense", tmp_path)["config"]))
    harm(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        model.hf.load(tmp_path)


def test_parameters_are_laid_out_by_the_table(policy):
    """The tower lies as the decoder does: over `fsdp` by widths, over `tensor` by heads."""
    config, *_ = policy
    specs = params.partition_specs(config)["vision"]
    assert specs["patch"] == jax.P(None, "fsdp")
    assert specs["blocks"]["qkv"] == jax.P(None, "fsdp", None, "tensor", None)
    assert specs["deepstack"]["fc2"] == jax.P(None, "tensor", "fsdp")
    assert jax.eval_shape(lambda: params.init(config, 0)) == params.abstract(config)
