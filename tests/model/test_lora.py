"""LoRA: logits of peft's recordings, gradients of adapters alone, names, merging, files."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sapo_jax import learner, model, sampler
from sapo_jax.model import hf, lora, params, peft
from sapo_jax.types import Frozen
from tests import fakes
from tests.learner.test_step import batch, plain_loss, settings
from tests.model import test_hf
from tests.oracles import drawn

__all__ = ["batch"]  # a fixture
RECORDED = sorted(path.stem for path in (test_hf.ORACLES / "lora").glob("*.npz"))
SCALE = 2.0
logits_of = jax.jit(model.logits, static_argnums=1)


def adapted(config, rank=3, targets=(), seed=1):
    """A shape with adapters, and adapters none of whose factors is 0."""
    found = lora.targets(targets, params.layer_table(config))
    config = dataclasses.replace(config, lora_rank=rank, lora_targets=found)
    return config, fakes.perturbed(params.init(config, seed), 0.1)


def settings_of(config, **kw):
    return settings(config, **{"lora_scale": SCALE, **kw})


def read_recorded(name, directory):
    """The recorded base as a directory, its adapters, and what peft computed and was given."""
    with np.load(test_hf.ORACLES / "lora" / f"{name}.npz") as found:
        recorded = {key: found[key] for key in found}
    recorded["shapes"] = json.loads(str(recorded["shapes"]))
    test_hf.write_recorded(str(recorded["case"]), directory)
    config, base = hf.load(directory)
    rank, alpha = recorded["rank_alpha"].tolist()
    wanted = lora.targets(recorded["targets"].tolist(), params.layer_table(config))
    config = dataclasses.replace(config, lora_rank=rank, lora_targets=wanted)

    def draw(spec):
        leaf = np.empty(spec.shape, np.float32)
        for at, key in spec.tensors():
            key = f"base_model.model.{key}"
            leaf[at] = drawn.tensor(key, recorded["shapes"][key]).T.reshape(leaf[at].shape)
        return leaf

    adapters = jax.tree.map(draw, lora.trained(params.table(config), config))
    return config, base, adapters, alpha, recorded


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_peft(name, tmp_path):
    """Of adapters applied and merged: the scale, a transpose or an expert moves logits by tens of
    percents.
    """
    config, base, adapters, alpha, recorded = read_recorded(name, tmp_path)
    policy = lora.join(adapters, Frozen(base), alpha / config.lora_rank)
    tokens, expected = drawn.tokens(config.vocab_size), recorded["logits"]
    test_hf.close(logits_of(policy, config, tokens), expected, 1e-5)
    test_hf.close(logits_of(lora.merge(policy), lora.base(config), tokens), expected, 1e-5)
    without = np.abs(logits_of(base, lora.base(config), tokens) - expected).max()
    assert without > 0.3 * np.abs(expected).max()


@pytest.mark.parametrize("name", RECORDED)
def test_adapters_are_saved_as_peft_names_them(name, tmp_path):
    config, _, adapters, alpha, recorded = read_recorded(name, tmp_path)
    peft.save(tmp_path / "out", config, adapters, alpha=alpha, base="models/base")
    tensors = safetensors.numpy.load_file(tmp_path / "out" / peft.WEIGHTS)
    assert {key: list(x.shape) for key, x in tensors.items()} == recorded["shapes"]
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, drawn.tensor(key, tensor.shape))
    content = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert (content["r"], content["lora_alpha"]) == (config.lora_rank, alpha)
    modules = {f"{target}_proj" for target in recorded["targets"].tolist()}
    assert set(content["target_modules"]) == modules
    assert content["base_model_name_or_path"] == "models/base"


def test_one_of_two_fused_projections_is_saved_with_the_other(tmp_path):
    """transformers 5 has gate and up of experts in one matrix: peft wants adapters of both."""
    config, adapters = adapted(model.make("nano_moe", vocab_size=23), targets=("experts_gate",))
    peft.save(tmp_path, config, adapters, alpha=6.0)
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    assert all(np.any(x) == ("gate_proj" in key) for key, x in tensors.items())
    assert json.loads((tmp_path / peft.CONFIG).read_text())["target_modules"] == [
        "gate_proj", "up_proj"
    ]  # fmt: skip
    mixed = model.make("nano_moe", vocab_size=23, mlp_only_layers=(0,))
    for targets, allowed in ((("q", "experts"), True), (("mlp",), False)):
        config, adapters = adapted(mixed, targets=targets)
        if allowed:
            peft.save(tmp_path, config, adapters, alpha=6.0)
            continue
        with pytest.raises(ValueError, match="gate, up, down of dense layers beside experts"):
            peft.save(tmp_path, config, adapters, alpha=6.0)


NAMES = {
    ("nano", ()): "q k v o gate up down",
    ("nano", ("v", "q_proj", "mlp")): "q v gate up down",
    ("nano_moe", ("attention",)): "q k v o",
    ("nano_moe", ("gate", "experts_down")): "experts_gate experts_down",
}


@pytest.mark.parametrize(("preset", "names"), NAMES)
def test_targets_by_name(preset, names):
    table = params.layer_table(model.make(preset, vocab_size=23))
    assert lora.targets(names, table) == tuple(NAMES[preset, names].split())


@pytest.mark.parametrize(("preset", "name"), [("nano", "experts_up"), ("nano_moe", "router")])
def test_a_target_that_is_none_is_refused(preset, name):
    table = params.layer_table(model.make(preset, vocab_size=23))
    with pytest.raises(ValueError, match=rf"'{name}' is no projection; there are q, k, v, o, "):
        lora.targets(("q", name), table)


def test_the_first_policy_is_the_base(nano):
    config, base = nano
    own = dataclasses.replace(config, lora_rank=2, lora_targets=("q", "down"))
    policy = lora.join(params.init(own, 3), Frozen(base), SCALE)
    tokens = drawn.tokens(config.vocab_size)
    expected = logits_of(base, config, tokens)
    np.testing.assert_array_equal(logits_of(policy, own, tokens), expected)
    a = np.asarray(policy["layers"]["down_lora_a"])
    assert np.var(a) == pytest.approx(1 / (3 * config.intermediate_size), rel=0.3)


MIXED = {"mlp_only_layers": (0,), "num_hidden_layers": 3}  # a dense layer and two sparse ones


@pytest.mark.parametrize(
    ("preset", "fields"),
    [("nano", {}), pytest.param("nano_moe", MIXED, marks=pytest.mark.slow)],
)
def test_gradients_are_those_through_the_merged_parameters(preset, fields, batch):
    """By the chain rule, of two micro-batches; of adapters, and of nothing else."""
    shape = model.make(preset, vocab_size=fakes.VOCAB, **fields)
    base = fakes.perturbed(params.init(shape, 0))
    config, adapters = adapted(shape)

    def merged_loss(own):
        policy = lora.merge(lora.join(own, Frozen(base), SCALE))
        return plain_loss(policy, batch, settings_of(shape))

    loss, expected = jax.jit(jax.value_and_grad(merged_loss))(adapters)
    hp = settings_of(config, micro_batches=2, remat=preset == "nano_moe")
    grads, terms = jax.jit(learner.gradient)(adapters, batch, hp, Frozen(base))
    total = terms["loss"].numerator / terms["loss"].denominator
    assert float(total) == pytest.approx(float(loss), abs=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, expected)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)) > 1e-4 * scale


@pytest.mark.parametrize("preset", ["nano", pytest.param("nano_moe", marks=pytest.mark.slow)])
def test_no_gradient_of_the_base_is_formed(preset, batch):
    """Not of the head, which makes its own in a loop, nor of experts, which carry theirs along.

    What the program holds with the shape of a frozen matrix are parameters, and slices of them.
    """
    shape = model.make(preset, vocab_size=fakes.VOCAB, intermediate_size=208,
                       **{"moe_intermediate_size": 56} if preset == "nano_moe" else {})  # fmt: skip
    config, adapters = adapted(shape)
    state, frozen = learner.init(adapters, settings_of(config)), Frozen(params.init(shape, 0))
    assert jax.tree.structure(state.opt_state[1].mu) == jax.tree.structure(adapters)
    hp = settings_of(config, remat=True)
    text = learner.update.lower(state, batch, hp, frozen).compile().as_text()
    table = params.table(shape)
    matrices = {"embed": table["embed"].shape} | {
        name: spec.shape[1:] for name, spec in table["layers"].items() if spec.transposed
    }
    for name, sizes in matrices.items():
        found = re.findall(rf" = f32\[(?:\d+,)?{','.join(map(str, sizes))}\]\S* ([a-z-]+)", text)
        assert found, name
        assert set(found) <= {"parameter", "get-tuple-element", "bitcast", "fusion", "slice"}, name


@pytest.mark.slow
def test_an_update_moves_adapters_alone(nano, batch):
    config, base = nano
    config, adapters = adapted(config)
    hp = settings_of(config).replace(weight_decay=0.1)
    state, kept = learner.init(jax.tree.map(jnp.copy, adapters), hp), jax.device_get(base)
    state, _ = learner.update(state, batch, hp, Frozen(base))
    jax.tree.map(np.testing.assert_array_equal, base, kept)
    moved = jax.tree.map(lambda a, b: bool(np.all(a != b)), state.params, adapters)
    assert all(jax.tree.leaves(moved))


def test_one_executable_for_all_scales(nano, batch):
    config, base = nano
    config, adapters = adapted(config)
    with fakes.Compilations() as compiled:
        for scale in (0.5, 4.0):
            hp = settings_of(config, lora_scale=scale, head_chunk=8)
            learner.score(adapters, batch, hp, Frozen(base))
    assert compiled.names["score"] == 1


@pytest.mark.slow
def test_bfloat16_base_and_sampler(nano):
    """The base in bfloat16, adapters in float32; the sampler applies them, as the learner does."""
    shape = dataclasses.replace(nano[0], param_dtype="bfloat16", compute_dtype="bfloat16")
    config, adapters = adapted(shape)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    base = jax.tree.map(jnp.bfloat16, nano[1])
    policy = lora.join(adapters, Frozen(base), SCALE)
    fast = sampler.to_sampler(policy, config)
    assert {x.dtype for x in jax.tree.leaves(fast)} == {jnp.dtype("bfloat16")}
    assert fast["layers"][1]["q_lora_a"].shape == (64, 3)
    rows = sampler.rollout(
        policy, config, fakes.prompts(4, 5), group_size=2, max_new_tokens=6, temperature=1.0,
        seed=0, iteration=0,
    )  # fmt: skip
    gap = np.abs(rows.sampler_logp - _scored(adapters, base, config, rows))[rows.mask]
    assert gap.mean() < 0.02
    assert gap.max() < 0.1


def _scored(adapters, base, config, rows):
    from sapo_jax.training.experience import batch_of

    hp = settings_of(config)
    return np.asarray(learner.score(adapters, batch_of(rows), hp, Frozen(base)))
