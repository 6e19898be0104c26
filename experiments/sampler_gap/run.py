"""The gap |log π_sampler − log π_learner| of the same weights, by position and by log π, as JSON.

    python -m experiments.sampler_gap.run --config=quickstart --config.init_from="" --out=FILE.json
    python -m experiments.sampler_gap.run --config=quickstart \
        --config.init_from=runs/quickstart_sft --out=FILE.json
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from etils import epath

from sapo_jax import cli, learner, model, sampler
from sapo_jax.data import encode
from sapo_jax.training import checkpoint, provenance, settings, startup
from sapo_jax.training.checks import require
from sapo_jax.training.engine import Streamed
from sapo_jax.training.experience import batch_of, open_stream
from sapo_jax.training.settings import Settings

FLAGS = cli.Flags("experiments.sampler_gap.run", __doc__)
FLAGS.config_file()
FLAGS.integer("rollouts", 1, "Batches of prompts to sample.", 1)
FLAGS.string("out", "", "JSON file; by default it is printed.")
HERE = pathlib.Path(__file__).parent
PARTS = 8  # bins of as many tokens each


def gaps(run: Settings, params: Any, iteration: int) -> dict[str, np.ndarray]:
    """Of each token of a rollout: the gap, its place in the completion, and log π, f[N].

    Of the tokens of a few rows, the largest |logit| too.
    """
    stream, rows = open_stream(run), run.config.batch.prompts
    examples = stream.take(rows * (iteration + 1))[rows * iteration :]
    prompts = encode.encode_prompts(examples, run.tokenizer, run.width)
    rollout = sampler.rollout(
        sampler.to_sampler(params, run.model), run.model, prompts, iteration=iteration,
        **run.sampling(),
    )  # fmt: skip
    logp_BS = np.asarray(learner.score(params, batch_of(rollout), run.hp))
    mask_BS = np.asarray(rollout.mask)
    place_BS = np.cumsum(mask_BS, -1)
    gap_BS = np.abs(logp_BS - np.asarray(rollout.sampler_logp))
    some = slice(8)  # rows whose logits exist at a time
    logits_BSV = np.asarray(model.logits(params, run.model, rollout.tokens[some]))
    return {
        "gap": gap_BS[mask_BS],
        "position": place_BS[mask_BS],
        "logp": logp_BS[mask_BS],
        "logit": np.abs(logits_BSV[mask_BS[some]]).max(-1),
    }


def binned(gap_N: np.ndarray, by_N: np.ndarray) -> list[dict[str, float]]:
    """Mean, 99th percentile and largest gap in bins of almost as many tokens each."""
    edges = np.unique(np.quantile(by_N, np.linspace(0, 1, PARTS + 1)))
    index_N = np.clip(np.searchsorted(edges, by_N, side="right") - 1, 0, len(edges) - 2)
    rows = []
    for i in np.unique(index_N):
        values, gap = by_N[index_N == i], gap_N[index_N == i]
        rows.append({"from": float(values.min()), "to": float(values.max()), **_summary(gap)})
    return rows


def _summary(gap_N: np.ndarray) -> dict[str, float]:
    return {
        "tokens": len(gap_N),
        "mean": float(gap_N.mean()),
        "p99": float(np.quantile(gap_N, 0.99)),
        "max": float(gap_N.max()),
    }


def measure(run: Settings, rollouts: int) -> dict[str, Any]:
    """Everything that this experiment says of a config's first policy."""
    with tempfile.TemporaryDirectory() as empty, checkpoint.Checkpoints(empty) as checkpoints:
        (bundle,), _ = startup.start([Streamed(run)], checkpoints)
    each = [gaps(run, bundle.state.params, i) for i in range(rollouts)]
    found = {key: np.concatenate([one[key] for one in each]) for key in each[0]}
    return {
        "config": run.config.name,
        "model": epath.Path(run.config.model.preset).name,
        "init_from": epath.Path(run.config.init_from).name,
        "compute": run.config.dtype.compute,
        "device": jax.devices()[0].device_kind,
        "largest_logit": float(found["logit"].max()),
        "all": _summary(found["gap"]),
        "by_position": binned(found["gap"], found["position"]),
        "by_logp": binned(found["gap"], found["logp"]),
        "versions": provenance.provenance()["versions"],
    }


def main(given: cli.Flags) -> None:
    """Measure, and print or store it."""
    given.config.batch.pack = False  # gaps are looked at by row
    run = settings.from_config(given.config)
    room = run.config.data.max_image_tokens
    require(not room, "data.max_image_tokens", room, "0: gaps are measured of text alone")
    cli.use_cache(given.config.compilation_cache)
    text = json.dumps(measure(run, given.rollouts), indent=1)
    if given.out:
        epath.Path(given.out).expanduser().write_text(text + "\n")
    print(given.out or text)


if __name__ == "__main__":
    cli.run(main, FLAGS)
