"""Runs that see: from a cold start to a report, killed and resumed, alone and among others."""

import dataclasses
import json
import shlex
import signal

import jax
import numpy as np
import pytest

from sapo_jax import export, learner, model, train
from sapo_jax.report.run import write
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import checkpoint, parameters, settings
from sapo_jax.training.workdir import read_metrics, read_samples
from tests import tiny_config
from tests.data.test_images import chat_directory, picture
from tests.sweep.test_population import Bar
from tests.test_export import evaluated
from tests.test_train import SHAPED, digest, records, run, spawn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]
SHAPES = {"name": "count_shapes", "share": 0.5, "options": {"size": 16, "cells": 2, "colours": 2}}
TEXT = {"name": "chain_sum", "share": 0.5, "options": {"terms": 2}}
FIELDS = SHAPED | {
    "tasks": {"shapes": SHAPES, "text": TEXT},
    "model.preset": "tiny_vl", "model.num_hidden_layers": 2, "data.max_image_tokens": 4,
}  # fmt: skip
COLD = {
    "source": "demonstrations", "iterations": 2, "eval.every": 0, "model.train_vision": True,
    "objective.name": "reinforce", "objective.aggregation": "token_mean",
}  # fmt: skip


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cold") / "run"
    run(workdir, **FIELDS | COLD)
    return workdir


def state_of(workdir, checked):
    found = checkpoint.restore_params(
        workdir / "checkpoints", learner.abstract(checked.hp).params, which="latest"
    )
    return jax.device_get(found)


@pytest.mark.parametrize("trained", [False, True])
def test_a_killed_run_that_sees_ends_like_an_uninterrupted_one(cold, trained, tmp_path):
    """Bit for bit: state, metrics, samples; and a frozen tower is that of the cold start."""
    fields = FIELDS | {"init_from": str(cold), "model.train_vision": trained}
    fields["staleness"] = int(trained)  # images wait in the checkpoint, too
    assert spawn(tmp_path / "whole", **fields).wait() == 0
    assert spawn(tmp_path / "run", "minibatch 5", **fields).wait() == -signal.SIGKILL
    checked = run(tmp_path / "run", **fields)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    found, wanted = (state_of(tmp_path / name, checked) for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert ("vision" in found) == trained
    whole = parameters.learnt(checked, tmp_path / "run", 6)
    before = parameters.learnt(settings.of_run(cold), cold, 2)
    same = jax.tree.map(np.array_equal, whole["vision"], before["vision"])
    assert all(jax.tree.leaves(same)) != trained
    gaps = [r["sampler/logp_gap_max"] for r in read_metrics(tmp_path / "run")[1:]]
    assert max(gaps[: 1 if trained else None]) <= 1e-5  # later ones are of a policy that moved on


def test_a_run_of_a_map_is_bitwise_the_run_alone(cold, tmp_path):
    """They share the frozen tower; each has images of its own."""
    config = tiny_config.get_config()
    own = {"init_from": str(cold), "iterations": 3, "sampler.slots": 0}
    config.update_from_flattened_dict(FIELDS | own)
    changes = [{"seed": 0}, {"seed": 1, "learner.learning_rate": 3e-3}]
    (cohort,) = cohorts.make(config, changes)
    schedule.run_cohort(cohort, tmp_path / "both", Bar())
    train.run(cohort.runs[1], tmp_path / "alone")
    among = tmp_path / "both" / cohort.names[1]
    assert records(among) == records(tmp_path / "alone")
    assert digest(among) == digest(tmp_path / "alone")


@pytest.mark.parametrize("method", ["vmap"])
def test_runs_at_once_see(cold, method, tmp_path):
    """Under vmap each has its own images, and the sampler's gap is as small."""
    config = tiny_config.get_config()
    own = {"init_from": str(cold), "iterations": 2, "population.method": method}
    own["sampler.slots"] = 0
    config.update_from_flattened_dict(FIELDS | own)
    (cohort,) = cohorts.make(config, [{"seed": 0}, {"seed": 1}])
    schedule.run_cohort(cohort, tmp_path / "both", Bar())
    for name in cohort.names:
        found = read_metrics(tmp_path / "both" / name)
        assert max(r["sampler/logp_gap_max"] for r in found[1:]) <= 2e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"staleness": 1, "learner.old_logp": "recompute"},
        {"sampler.budget": 96, "batch.oversample": 1},
        {"batch.oversample": 2, "lora.rank": 2, "objective.kl_coef": 0.1},
        {"model.train_vision": True, "objective.kl_coef": 0.1, "staleness": 1},
        {"data.swap_images": True},
    ],
)  # fmt: skip
def test_what_else_runs_do(cold, fields, tmp_path):
    """Batches that wait, budgets, prompts to spare, adapters, reference policies, the control."""
    checked = run(tmp_path / "run", **FIELDS | {"init_from": str(cold), "iterations": 3} | fields)
    found = read_metrics(tmp_path / "run")
    assert found[-1]["iteration"] == 3
    assert all(r["grad/norm"] >= 0 for r in found[1:])
    assert np.isfinite(jax.tree.leaves(state_of(tmp_path / "run", checked))[0]).all()


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "test": str(path), "template": "{problem}"}


def test_a_run_from_a_directory_with_a_chat_template(tmp_path):
    """Pictures of files before and within the text, two of them, none; the tower learns, too."""
    policy = tmp_path / "policy"
    policy.mkdir()
    ids = chat_directory(policy, ["Text"])
    tower = dataclasses.replace(model.config.TINY_TOWER, **ids)
    shape = model.make("tiny_vl", vocab_size=64, num_hidden_layers=2, vision=tower)
    model.hf.save(policy, shape, model.params.init(shape, 0))
    for i in range(4):
        picture(8 + 8 * (i % 2), 8 + i).save(tmp_path / f"{i}.png")
    seen = [
        {"question": text.format(i), "answer": 3, "image": [f"{i}.png", f"{3 - i}.png"][:count]}
        for i in range(4)
        for text, count in (("Text{}", 1), ("{}<image1>Text", 1), ("<image1>{}<image2>Text", 2))
    ]
    told = [{"problem": f"{i}Text", "answer": 3} for i in range(12)]
    given = {"init_from": str(policy), "model.preset": str(policy), "iterations": 2}
    given |= {"tokenizer.directory": str(policy), "tokenizer.chat": True, "eval.every": 0}
    given |= {"data.max_prompt_tokens": 36, "sampler.max_new_tokens": 24}
    given |= {"reward.overlong": 1.0, "reward.buffer": 24, "reward.max_length": 24}
    given |= {"model.train_vision": True, "data.max_image_tokens": 12, "log.samples": 32}
    given["tasks"] = {
        name: {"name": task, "share": 0.5, "options": lines(tmp_path / f"{name}.jsonl", rows)}
        for name, task, rows in (("seen", "mathvision", seen), ("told", "math_answer", told))
    }
    run(tmp_path / "run", **given)
    first, last = read_metrics(tmp_path / "run")[-2:]
    assert first["sampler/logp_gap_max"] <= 1e-5
    assert min(first["grad/norm"], last["grad/norm"]) > 0
    rows = [row for i in (1, 2) for row in read_samples(tmp_path / "run", i)]
    assert {len(row.get("images", [])) for row in rows} == {0, 1, 2}
    export.export(tmp_path / "run", tmp_path / "out")
    _, weights = model.hf.load(tmp_path / "out")
    before = model.hf.load(policy)[1]
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), weights, before)
    assert all(jax.tree.leaves(moved["vision"]))
    command = shlex.split(export.evaluation(tmp_path / "run", tmp_path / "out"))
    found = evaluated(tmp_path / "found.json", *command[3:], "--samples=2")
    assert [own["eval/prompts"] for own in found["sets"].values()] == [12, 12]


def test_report_export_and_evaluation(cold, tmp_path):
    """The page shows pictures beside completions; the exported directory has the tower, and gets
    on the same pictures what the run gets."""
    fields = FIELDS | {"init_from": str(cold), "iterations": 1, "log.samples": 16}
    checked = run(tmp_path / "run", **fields)
    rows = read_samples(tmp_path / "run")
    with_images = [row for row in rows if "images" in row]
    assert with_images
    assert len(with_images) < len(rows)
    text = write(tmp_path / "run").read_text()
    assert f'src="{with_images[0]["images"][0]}"' in text
    assert "img-src data:" in text  # else a browser would not show them
    assert "<b>shapes, text</b>" in text
    export.export(tmp_path / "run", tmp_path / "out")
    config, weights = model.hf.load(tmp_path / "out")
    whole = parameters.learnt(checked, tmp_path / "run", 1)
    jax.tree.map(np.testing.assert_array_equal, weights["vision"], whole["vision"])
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokens["<|image_pad|>"] == config.vision.image_token_id
    command = shlex.split(export.evaluation(tmp_path / "run", tmp_path / "out"))
    assert "--max_image_tokens=4" in command
    common = ["--prompts=4", "--samples=3"]
    own = evaluated(tmp_path / "own.json", f"--workdir={tmp_path / 'run'}", *common)
    other = evaluated(tmp_path / "other.json", *command[3:], *common)
    shapes, text = other["sets"].values()
    assert own["sets"] == {"shapes": shapes, "text": text}
    with pytest.raises(ValueError, match=r"no prompt fits .* and --max_image_tokens=3"):
        evaluated(tmp_path / "own.json", f"--hf={tmp_path / 'out'}", "--chat=False",
                  "--task=count_shapes,size=16", "--max_image_tokens=3")  # fmt: skip
