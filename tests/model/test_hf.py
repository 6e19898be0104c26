"""Hugging Face directories: logits of recorded models, round trips, refusals, memory."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sapo_jax import model
from sapo_jax.model import params
from tests import fakes
from tests.oracles import drawn

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
CASES = sorted(path.stem for path in ORACLES.glob("*.npz"))


def write_recorded(name, directory):
    """The recorded model as a directory; returns the logits that transformers computed."""
    with np.load(ORACLES / f"{name}.npz") as recorded:
        weights = {k: drawn.tensor(k, s) for k, s in json.loads(str(recorded["shapes"])).items()}
        (directory / "config.json").write_text(str(recorded["config"]))
        safetensors.numpy.save_file(weights, directory / "model.safetensors")
        return recorded["logits"]


def close(got, expected, tolerance=1e-4):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def logits_of(directory, **kw):
    config, weights = model.hf.load(directory, **kw)
    run = jax.jit(model.logits, static_argnums=1)
    return np.asarray(run(weights, config, drawn.tokens(config.vocab_size)))


def test_there_are_enough_recordings():
    assert len(CASES) >= 12
    assert sum((ORACLES / f"{name}.npz").stat().st_size for name in CASES) <= 2e6
    for name in CASES:
        with np.load(ORACLES / f"{name}.npz") as recorded:
            assert json.loads(str(recorded["versions"]))["transformers"]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    """Names, transposes, head order, scaled positions, gates: each moves logits by percents."""
    expected = write_recorded(name, tmp_path)
    close(logits_of(tmp_path), expected)


@pytest.mark.parametrize("name", ["moe_every_second", "qwen2_tied", "llama_llama3"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_save_and_load_give_the_same_parameters(name, shard_bytes, tmp_path):
    write_recorded(name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    config, weights = model.hf.load(tmp_path)
    model.hf.save(tmp_path / "out", config, weights, files_from=tmp_path, shard_bytes=shard_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    again_config, again = model.hf.load(tmp_path / "out")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, weights, again)
    original = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    written = {k: v for f in files for k, v in safetensors.numpy.load_file(f).items()}
    assert written.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'


@pytest.mark.slow
def test_bfloat16_in_and_out(tmp_path):
    """Files in bf16 load into f32 exactly, and back; f32 files load into bf16 by rounding."""
    config = model.make("nano", vocab_size=23, param_dtype="bfloat16")
    weights = jax.tree.map(jnp.bfloat16, fakes.perturbed(params.init(config, 0)))
    model.hf.save(tmp_path, config, weights)
    _, wide = model.hf.load(tmp_path, dtype=jnp.float32)
    assert wide["embed"].dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), weights, wide)
    narrow_config, narrow = model.hf.load(tmp_path, dtype="bfloat16")
    assert narrow_config.compute_dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, narrow, weights)


def test_stop_and_pad_tokens(tmp_path):
    """generation_config.json decides; a single number and a list are both allowed."""
    write_recorded("qwen3_tied", tmp_path)
    config, _ = model.hf.load(tmp_path)
    assert (config.stop_tokens, config.pad_token) == ((2, 5), 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "pad_token_id": 1}')
    config, _ = model.hf.load(tmp_path)
    assert (config.stop_tokens, config.pad_token) == ((7,), 1)


def change_config(**fields):
    def change(directory):
        path = directory / "config.json"
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))

    return change


def change_tensors(edit):
    def change(directory):
        path = directory / "model.safetensors"
        content = safetensors.numpy.load_file(path)
        edit(content)
        safetensors.numpy.save_file(content, path)

    return change


def write_json(name, content):
    return lambda directory: (directory / name).write_text(json.dumps(content))


def index_of(places):
    def change(directory):
        (directory / "model.safetensors").unlink()
        write_json("model.safetensors.index.json", {"weight_map": places})(directory)

    return change


def remove_a_shard(directory):
    config, weights = model.hf.load(directory)
    model.hf.save(directory, config, weights, shard_bytes=20_000)
    sorted(directory.glob("model-*"))[1].unlink()


def rename(content):
    content["model.layers.1.mlp.experts.9.up_proj.weight"] = content.pop(
        "model.layers.1.mlp.experts.3.up_proj.weight"
    )


def reshape(content):
    content["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)


def integers(content):
    content["model.norm.weight"] = np.zeros(32, np.int32)


def too_many_words(directory):
    words = {"model": {"vocab": {"a": 0, "b": 96}}, "added_tokens": [{"id": 97, "content": "c"}]}
    (directory / "tokenizer.json").write_text(json.dumps(words))


def fuse(content, *, of=(0, 1, 2), up=True, down=True):
    for layer in of:
        at = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: np.stack([content[f"{at}.{e}.{part}_proj.weight"] for e in range(6)])
            for part in ("gate", "up", "down")
        }
        fused = [("gate_up", np.concatenate([parts["gate"], parts["up"]], 1), ("gate", "up"))] * up
        fused += [("down", parts["down"], ("down",))] * down
        for name, value, members in fused:
            content[f"{at}.{name}_proj"] = value
            for e, part in itertools.product(range(6), members):
                del content[f"{at}.{e}.{part}_proj.weight"]


def strip(content, of="model."):
    for key in [key for key in content if key.startswith(of)]:
        content[key.removeprefix("model.")] = content.pop(key)


def double(content):
    content["norm.weight"] = content["model.norm.weight"] * 3


def more_experts(content):
    fuse(content)
    key = "model.layers.1.mlp.experts.down_proj"
    content[key] = np.concatenate([content[key]] * 2)


BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    "architecture": (change_config(model_type="gpt2"), "'gpt2'.*qwen3, qwen3_moe, qwen2, llama"),
    "field": (change_config(vocab_size="absent"), "lacks vocab_size"),
    "window": (
        change_config(use_sliding_window=True, sliding_window=63),
        "use_sliding_window=True with sliding_window=63 .*least.*64",
    ),
    "nested": (change_config(rope_parameters={"full_attention": {}}), "full_attention"),
    "activation": (change_config(hidden_act="gelu"), "hidden_act='gelu'"),
    "scaling": (change_config(rope_parameters={"rope_type": "dynamic", "factor": 2}), "dynamic"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors"),
    "damaged": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "damaged"),
    "missing shard": (remove_a_shard, "model-00002-of-.*: missing shard; .* places"),
    "name": (change_tensors(rename), "missing: .*experts.3.up_proj.*left over: .*experts.9.up"),
    "shape": (change_tensors(reshape), r"q_proj.weight is \[32, 31\], must be \[32, 32\]"),
    "fused": (change_tensors(more_experts), r"left over: model.layers.1.mlp.experts.down_proj$"),
    "prefix": (
        change_tensors(lambda c: (c.pop("model.norm.weight"), strip(c))),
        "missing: model.norm",
    ),
    "twice": (change_tensors(double), "model.norm.weight and norm.weight are the same tensor"),
    "mlp_bias": (change_config(model_type="llama", mlp_bias=True), "mlp_bias=True"),
    "dtype": (change_tensors(integers), "model.norm.weight is I32, must be one of F32/BF16"),
    "tokenizer": (too_many_words, "largest id is 97, the model's vocabulary has 97"),
    "no tokenizer": (write_json("tokenizer.json", {"model": "x"}), "tokenizer.json is no tokeniz"),
    "a list": (write_json("config.json", []), "config.json: holds list, must be an object"),
    "text": (change_config(hidden_size="32"), r"hidden_size='32': must be a whole number in \[1"),
    "fraction": (change_config(num_hidden_layers=3.0), "num_hidden_layers=3.0: must be a whole"),
    "bool": (change_config(head_dim=True), "head_dim=True: must be a whole number"),
    "no flag": (change_config(norm_topk_prob="no"), "norm_topk_prob='no': must be true or false"),
    "no number": (change_config(rms_norm_eps=float("nan")), "rms_norm_eps=nan: must be a number"),
    "negative": (change_config(rms_norm_eps=-1), "rms_norm_eps=-1: must be a number above 0"),
    "no list": (change_config(mlp_only_layers="4"), "mlp_only_layers='4': must be a list"),
    "eos": (change_config(eos_token_id=[None]), r"eos_token_id=\[None\]: must be a whole number"),
    "far eos": (change_config(eos_token_id=97), r"eos_token_id=97: must be in \[0, vocab_size=97"),
    "generation": (write_json("generation_config.json", {"eos_token_id": "x"}), "eos_token_id='x'"),
    "no scaling": (change_config(rope_scaling=2.0), "rope_scaling=2.0: must be an object"),
    "theta": (
        change_config(rope_parameters={"rope_theta": "1e4"}),
        "rope_parameters.rope_theta='1e4': must be a number above 1",
    ),
    "factor": (
        change_config(rope_parameters={"rope_type": "linear", "factor": [2]}),
        r"rope_parameters.factor=\[2\]: must be a number above 0",
    ),
    "frequencies": (
        change_config(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        ),
        "high_freq_factor=4: must be above low_freq_factor=4",
    ),
    "layers": (change_config(layer_types=["full_attention"]), "must be num_hidden_layers=3 of"),
    "layer": (change_config(layer_types=["linear_attention"] * 3), "layer_types=.*linear"),
    "index": (index_of(["a"]), r"weight_map=\['a'\]: must be an object of texts"),
    "empty index": (index_of({}), "missing: model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(name, tmp_path):
    harm, message = BAD[name]
    write_recorded("moe", tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        model.hf.load(tmp_path)


def measure_loading(directory, mesh=None):
    """Peak of host memory while loading beyond what stays, and its bound, in bytes.

    numpy and safetensors report their buffers to tracemalloc; what is handed to a device is part
    of the parameters. What other threads of the process allocate meanwhile only adds to it: of
    three times, the least.
    """
    model.hf.load(directory, mesh=mesh)
    more = []
    for _ in range(3):
        tracemalloc.start()
        config, weights = model.hf.load(directory, mesh=mesh)
        stays, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        more.append(peak - stays)
    leaves = jax.tree.leaves(weights)
    shard = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    tensor = 4 * config.vocab_size * config.hidden_size
    return config, weights, min(more), tensor + 2 * shard


def big_enough(directory):
    config = model.make(
        "nano_moe", vocab_size=2000, hidden_size=128, moe_intermediate_size=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    weights = fakes.weights(config)
    model.hf.save(directory, config, weights, shard_bytes=1_000_000)
    return weights


def test_loading_holds_one_tensor_and_two_shards(tmp_path):
    """Peak host memory beyond the parameters: one tensor + 2 × the largest per-device shard."""
    weights = big_enough(tmp_path)
    _, again, peak, bound = measure_loading(tmp_path)
    assert 0 < peak <= bound
    jax.tree.map(np.testing.assert_array_equal, weights, again)


SHARDED = """
import pathlib, sys
import jax, numpy as np
from tests.model import test_hf
directory = pathlib.Path(sys.argv[1])
weights = test_hf.big_enough(directory)
mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "expert"))
_, again, peak, bound = test_hf.measure_loading(directory, mesh)
assert peak <= bound, (peak, bound)
assert again["layers"]["experts_up"].sharding.spec[1:] == ("expert", "fsdp", "tensor")
assert again["embed"].addressable_shards[0].data.shape == (1000, 64)
jax.tree.map(np.testing.assert_array_equal, weights, again)
odd = jax.make_mesh((8,), ("tensor",))
try:
    test_hf.model.hf.load(directory, mesh=odd)
except ValueError as error:
    print(error)
"""


def test_loading_into_a_mesh_reads_shard_by_shard(tmp_path):
    """Eight devices: the same bound with smaller shards, and the same parameters."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=ORACLES.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'kv_heads' of size 2 does not divide by the mesh axis 'tensor' of size 8" in done.stdout
