"""Whole runs: nothing compiles after the start, killed runs resume bit for bit, misuse fails."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import logging

from sapo_jax import learner, rewards, train
from sapo_jax.model import params
from sapo_jax.training import checkpoint, parameters, provenance, settings, startup
from sapo_jax.training.lease import Lease
from sapo_jax.training.workdir import read_metrics, read_samples
from tests import fakes, tiny_config
from tests.training.test_metrics import check

pytestmark = pytest.mark.usefixtures("no_plots")
# Rewards that differ: the tiny policy is never right, and where all are wrong nothing is learnt.
SHAPED = {"reward.overlong": 1.0, "reward.buffer": 6, "reward.max_length": 6}


def run(workdir, **fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    checked = settings.from_config(config)
    train.run(checked, workdir)
    return checked


def records(workdir):
    """Metrics without what a clock measured."""
    return [
        {k: v for k, v in r.items() if not k.startswith("time/")} for r in read_metrics(workdir)
    ]


def final_state(workdir, checked):
    abstract = jax.eval_shape(learner.init, params.abstract(checked.model), checked.hp)
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        state, meta = checkpoints.restore(checkpoints.latest(), abstract)
    return jax.device_get(state), meta


def digest(workdir):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((workdir / "samples").iterdir())
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run in a process of its own, like those that are killed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert spawn(workdir, **SHAPED).wait() == 0
    assert sum(record["grad/norm"] > 0 for record in records(workdir)[1:]) >= 3
    assert "<svg" in (workdir / "report.html").read_text()
    return workdir


def spawn(workdir, stop_at=None, **fields):
    """The tiny run in a process; with stop_at it kills itself there (see tests/killed_run.py)."""
    own = {"SAPO_JAX_TEST_STOP_AT": stop_at or "", "SAPO_JAX_TEST_FIELDS": json.dumps(fields)}
    environment = os.environ | own
    command = [sys.executable, "-m", "tests.killed_run", str(workdir)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


MORE = "checkpoint 6", "sigterm 5", "rollout 2", "rollout 5", "hangs 5"
STOPS = ["minibatch 5", *(pytest.param(stop, marks=pytest.mark.slow) for stop in MORE)]


@pytest.mark.parametrize("stop", STOPS)
def test_a_killed_run_ends_like_an_uninterrupted_one(whole, stop, tmp_path):
    """SIGKILL in a rollout, in minibatch 2, in a checkpoint write; or SIGTERM, in a rollout or
    in an update that does not end; then again.

    Noise keyed by process state, a data stream that restarts, or metrics kept from iterations that
    are run again would all show.
    """
    workdir = tmp_path / "run"
    asked = stop.startswith(("sigterm", "hangs"))
    assert spawn(workdir, stop, **SHAPED).wait() == (143 if asked else -signal.SIGKILL)
    if asked:  # of iteration 4 it kept nothing otherwise
        assert (workdir / "checkpoints" / "4").exists()
        assert not (workdir / "report.html").exists()
    assert not (workdir / "checkpoints" / "6").exists()
    # A third process; the programs that it has compiled serve all stops.
    checked = run(workdir, **SHAPED)
    assert records(workdir) == records(whole)
    assert digest(workdir) == digest(whole)
    (state, meta), (expected, expected_meta) = (final_state(w, checked) for w in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert meta == expected_meta
    assert int(state.iteration) == 6
    assert int(state.update) == 12


def test_the_run_directory_holds_what_a_person_needs(whole):
    config = json.loads((whole / "config.json").read_text())
    assert config["objective"]["name"] == "sapo"
    required = {
        "iteration", "update", "reward/mean", "policy/entropy", "policy/ratio_max",
        "policy/gate_mean", "policy/clipped", "grad/norm", "sampler/logp_gap_mean",
        "sampler/logp_gap_max", "length/mean", "time/rollout", "time/score", "time/update",
    }  # fmt: skip
    lines = read_metrics(whole)
    assert [r["iteration"] for r in lines] == list(range(7))
    conditions = ("source=rollout", "an evaluation", "eval.every", "checkpoint.every")
    check(lines, "", *conditions, "reward.overlong")
    for record in lines[1:]:
        assert required <= set(record)
        assert record["sampler/logp_gap_max"] <= 1e-5
        assert len(record["minibatch"]) == 2
    assert [r["iteration"] for r in lines if "eval/pass_at_1" in r] == [0, 3, 6]
    assert all("time/eval" in r for r in lines[1:] if "eval/pass_at_1" in r)
    rows = read_samples(whole, 4)
    assert {"prompt", "completion", "answer", "reward"} <= set(rows[0])
    assert (whole / "report.html").stat().st_size > 10_000
    assert list((whole / "tensorboard").iterdir())
    assert [start["devices"] for start in provenance.read(whole)] == [jax.device_count()]


def test_nothing_compiles_after_the_start(tmp_path, monkeypatch):
    """30 iterations, lengths through every bucket, evaluations, and a resume: 0 compilations."""
    counts = []
    warm_up = startup.warm_up

    def counted(*arguments):
        warm_up(*arguments)
        counter = fakes.Compilations()
        counter.__enter__()
        counts.append(counter)

    monkeypatch.setattr(startup, "warm_up", counted)
    fields = {"eval.every": 10, "checkpoint.every": 16, "sampler.max_new_tokens": 40}
    run(tmp_path / "run", iterations=16, **fields)
    counts[0].__exit__()
    assert counts[0].count == 0
    lengths = {r["length/max"] for r in read_metrics(tmp_path / "run") if "length/max" in r}
    assert max(lengths) == 40
    run(tmp_path / "run", iterations=32, **fields)
    counts[1].__exit__()
    assert counts[1].count == 0


def test_supervised_runs_start_others(tmp_path):
    """A cold start by demonstrations, then RL from its parameters."""
    cold = {
        "source": "demonstrations", "objective.name": "reinforce", "batch.group_size": 1,
        "sampler.slots": 0, "iterations": 2,
    }  # fmt: skip
    checked = run(tmp_path / "cold", **cold)
    taught, _ = final_state(tmp_path / "cold", checked)
    lines = read_metrics(tmp_path / "cold")
    check(lines, "", "an evaluation", "eval.every")
    losses = [r["policy/loss"] for r in lines[1:]]
    assert losses[1] < losses[0]
    frozen = {"learner.learning_rate": 0.0, "iterations": 1, "init_from": str(tmp_path / "cold")}
    checked = run(tmp_path / "rl", **frozen)
    state, _ = final_state(tmp_path / "rl", checked)
    jax.tree.map(np.testing.assert_array_equal, state.params, taught.params)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_other_objectives_run(tmp_path, objective):
    fields = SHAPED | {"objective.name": objective, "iterations": 1, "eval.every": 0}
    run(tmp_path / "run", **fields)
    assert read_metrics(tmp_path / "run")[0]["policy/gate_mean"] > 0


@pytest.mark.slow
def test_recomputed_old_logp_and_reference_kl(tmp_path):
    """The options that need another scoring pass: ratios start at 1, the KL penalty at 0."""
    run(tmp_path / "start", iterations=1, **{"eval.every": 0})
    fields = {
        "learner.old_logp": "recompute", "objective.kl_coef": 0.1, "batch.minibatches": 1,
        "init_from": str(tmp_path / "start"), "iterations": 1, "eval.every": 0,
    }  # fmt: skip
    run(tmp_path / "run", **fields)
    record = read_metrics(tmp_path / "run")[0]
    assert record["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert record["policy/kl_ref"] == pytest.approx(0, abs=1e-9)
    # The reference trains on: it is another policy then.
    shutil.rmtree(tmp_path / "start")
    run(tmp_path / "start", iterations=2, **{"eval.every": 0}, **SHAPED)
    moved = r"init_from=.*start' is not the reference .* \w+ of iteration 1, now \w+ of iteration 2"
    with pytest.raises(ValueError, match=moved):
        run(tmp_path / "run", **fields | {"iterations": 2})


def test_a_run_whose_numbers_are_not_finite_stops(tmp_path):
    """Updates are skipped and counted, then the run says where it stops; what it saved is healthy.

    An overflow in the second update of the first iteration; every update behind it is skipped.
    """
    fields = SHAPED | {"learner.learning_rate": 1e20, "checkpoint.every": 1}
    for most, where in ((2, "iteration 2, minibatch 1: 2"), (3, "iteration 2, minibatch 2: 3")):
        why = f"{where} updates in a row were skipped .*; the first was the gradient in iteration 1"
        with pytest.raises(train.NotFiniteError, match=why):
            run(tmp_path / "run", **fields | {"learner.max_skipped": most})
        lines = read_metrics(tmp_path / "run")
        assert [(r["update"], r.get("update/skipped", 0)) for r in lines] == [
            (0, 0),
            (1, 1),
            (1, 2),
        ]
        assert lines[-1]["minibatch"][1]["update/nonfinite"] == "gradient"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_starting_from_what_is_not_finite_is_refused(whole, tmp_path, monkeypatch):
    def lost(*arguments, **options):
        found = checkpoint.restore_params(*arguments, **options)
        return found | {"embed": found["embed"].at[3, 5].set(np.nan)}

    monkeypatch.setattr(parameters, "restore_params", lost)
    with pytest.raises(ValueError, match=r"init_from=.*: params/embed is not finite"):
        run(tmp_path / "run", init_from=str(whole))


def test_damage_falls_back_to_the_checkpoint_before(tmp_path, monkeypatch):
    """Of the newest checkpoint, and of records: what is lost is done again, or named."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *more: warnings.append(text % more))
    monkeypatch.setattr(checkpoint.Checkpoints, "_prune", lambda *_: None)
    workdir = tmp_path / "run"
    run(workdir, **SHAPED)
    expected, saved = records(workdir), workdir / "checkpoints" / "6"
    (file,) = saved.glob("state/ocdbt.process_0/d/*")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 16
    file.write_bytes(whole)
    run(workdir, **SHAPED)
    assert records(workdir) == expected
    assert any(
        "6 in" in w and "fails its checksum; see" in w and "iteration 3" in w for w in warnings
    )
    assert (saved.with_name("6.damaged")).exists()
    assert saved.exists()
    parts = sorted((workdir / "metrics").iterdir())
    parts[0].unlink()
    parts[1].write_bytes(b"\0" * 99)
    warnings.clear()
    run(workdir, **SHAPED)
    assert warnings == [
        f"{workdir}/metrics has no records of the iterations 0 to 6: lines or parts of it were lost"
    ]


@pytest.mark.slow
def test_what_is_rejected_moves_nothing(tmp_path):
    """Dynamic sampling, KL in the reward and a correction that rejects everything, in one run.

    Overlong shaping over the whole length gives rewards that differ.
    """
    run(tmp_path / "start", iterations=1, **{"eval.every": 0})
    of_reward = [f"reward.{part}" for part in rewards.PARTS[1:]]
    fields = dict.fromkeys(of_reward, 1.0) | {
        "learner.old_logp": "recompute", "reward.kl_coef": 0.1, "batch.oversample": 2,
        "reward.buffer": 6, "reward.max_length": 6,
        "correction.name": "geometric", "correction.low": 2.0, "correction.high": 3.0,
        "init_from": str(tmp_path / "start"), "iterations": 1, "eval.every": 0,
        "objective.schedule": "cosine", "objective.end.tau_neg": 2.0,
    }  # fmt: skip
    run(tmp_path / "run", **fields)
    record = read_metrics(tmp_path / "run")[0]
    others = ("objective.kl_coef or reward.kl_coef", "batch.oversample", "correction.name")
    check(record, "", "source=rollout", *of_reward, *others, "objective.schedule")
    assert record["objective/tau_neg"] == 1.05
    assert record["correction/cut"] == 1
    assert record["correction/rho_mean"] == pytest.approx(1, abs=1e-4)
    assert record["grad/norm"] == 0
    assert record["reward/mean"] == pytest.approx(-record["length/mean"] / 6)
    assert record["reward/kl"] == pytest.approx(0, abs=1e-4)
    # 16 prompts were drawn for 8: what has a signal is in the batch, up to all of it.
    informative = 16 * (1 - record["advantage/zero_groups"])
    assert record["advantage/kept_groups"] == pytest.approx(min(informative / 8, 1))


def test_profile_steps_write_a_trace(tmp_path):
    run(tmp_path / "run", iterations=4, profile_steps=1, **{"eval.every": 0})
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


REFUSED = [
    ({"seed": 5}, "seed: stored 0, given 5"),
    ({"objective.name": "grpo"}, "objective.name: stored 'sapo', given 'grpo'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_directory_of_another_config_is_refused(whole, fields, message):
    with pytest.raises(ValueError, match=message), fakes.Compilations() as compilations:
        run(whole, **SHAPED | fields)
    assert compilations.count == 0


def test_fewer_iterations_than_are_done_are_refused(whole):
    """It said nothing, and ended."""
    stored = (whole / "config.json").read_bytes()
    done = r"config.iterations=3: must be at least 6: .* has done these; with a larger"
    with pytest.raises(ValueError, match=done):
        run(whole, iterations=3, **SHAPED)
    assert (whole / "config.json").read_bytes() == stored


def test_starting_from_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"init_from='.*empty': nothing to restore: .*a run's, or"):
        run(tmp_path / "run", init_from=str(tmp_path / "empty"))


def test_a_cold_start_that_was_forgotten_is_named(tmp_path, monkeypatch):
    """The quickstart's, for whoever starts with its second command; nothing is made."""
    monkeypatch.chdir(tmp_path)
    command = "run this first: python -m sapo_jax.main --config=quickstart_sft --workdir=runs/quick"
    with pytest.raises(ValueError, match=f"no such directory .seen from {tmp_path}.; {command}"):
        run(tmp_path / "run", init_from="runs/quickstart_sft")
    assert list(tmp_path.iterdir()) == []


def test_starting_from_another_shape_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="embed"):
        run(tmp_path / "run", init_from=str(whole), **{"model.hidden_size": 96})


def test_a_second_process_is_refused(tmp_path):
    workdir = tmp_path / "run"
    with Lease(workdir), pytest.raises(RuntimeError, match=str(os.getpid())):
        run(workdir)


def test_a_finished_run_is_left_as_it_is(whole):
    """The same command again writes the report and nothing else."""
    before = {p: p.stat().st_mtime_ns for p in pathlib.Path(whole, "metrics").iterdir()}
    time.sleep(0.01)
    run(whole, **SHAPED)
    assert {p: p.stat().st_mtime_ns for p in pathlib.Path(whole, "metrics").iterdir()} == before
