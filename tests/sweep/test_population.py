"""Populations: a run among others is the run alone, nothing compiles twice, resume, grouping."""

import json
import os
import re
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

from sapo_jax import axes, cli, learner, objectives, rewards, train
from sapo_jax.learner import step
from sapo_jax.model import params
from sapo_jax.parallel.runs import vmapped
from sapo_jax.sampler import sampling
from sapo_jax.sweep import cohorts, rollouts, schedule
from sapo_jax.sweep.population import Population, hyperparameters, to_sampler
from sapo_jax.training import experience, startup, stopping
from sapo_jax.training.engine import Bundle, Ends, Streamed, pick, stack
from sapo_jax.training.lease import Lease
from sapo_jax.training.progress import Clock
from sapo_jax.training.workdir import read_metrics
from sapo_jax.types import Rollout, TrainState
from tests import fakes, tiny_sweep
from tests.sampler.test_engine import G, N, P, T, peaked, perturbed_logits, roll
from tests.test_train import digest, final_state, records

__all__ = ["peaked"]  # a fixture
pytestmark = pytest.mark.usefixtures("no_plots")

RUNS = axes.zip_(
    axes.axis("seed", 3, 4, 5),
    axes.axis("objective.tau_neg", 1.05, 1.0, 2.0),
    axes.axis("learner.learning_rate", 0.8e-4, 1e-4, 1.2e-4),
)


def base(**fields):
    times = {"iterations": 10, "eval.every": 5, "checkpoint.every": 5, "log.samples_every": 5}
    return tiny_sweep.get_config(**{**times, **fields})


class Bar:
    """Counts what a progress bar would show."""

    def __init__(self):
        self.steps, self.moved, self.notes, self.shown = 0, [], [], []

    def step(self, count):
        self.steps += count
        self.moved.append(count)

    skip = step

    def note(self, text):
        self.notes.append(text)

    def show(self, record):
        self.shown.append(record)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A population of three for 10 iterations; what it compiled, and what after its start."""
    workdir = tmp_path_factory.mktemp("together")
    (cohort,) = cohorts.make(base(), RUNS)
    bar, late, warm_up = Bar(), fakes.Compilations(), startup.warm_up
    jax.clear_caches()  # of programs that other tests have compiled

    def counted(*arguments):
        warm_up(*arguments)
        late.__enter__()

    with pytest.MonkeyPatch.context() as patch, fakes.Compilations() as compiled:
        patch.setattr(startup, "warm_up", counted)
        schedule.run_cohort(cohort, workdir, bar)
        late.__exit__()
    return workdir, cohort, bar, compiled, late


@pytest.fixture(scope="module")
def alone(together, tmp_path_factory):
    """The second run of the population, by itself."""
    workdir, checked = tmp_path_factory.mktemp("alone") / "run", together[1].runs[1]
    train.run(checked, workdir)
    return workdir


def test_a_run_of_a_map_is_bitwise_the_run_alone(together, alone):
    """Over 10 iterations, through both sizes of the cache: metrics, samples, last checkpoint.

    The noise or data order of another run, a learning rate that all share, rows that another run's
    verdicts judge: each shows in the first update at the latest.
    """
    workdir, cohort, *_ = together
    assert cohort.method == "map"
    among, checked = workdir / cohort.names[1], cohort.runs[1]
    found, expected = records(among), records(alone)
    assert len(found) == 11
    assert found == expected
    every = [[set(r) for r in read_metrics(place)] for place in (among, alone)]
    assert every[0] == every[1]  # phases that are timed, too
    assert all(r["grad/norm"] > 0 and r["length/max"] > 20 for r in found[1:])
    assert digest(among) == digest(alone)
    (state, meta), (wanted, wanted_meta) = (final_state(w, checked) for w in (among, alone))
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert meta == wanted_meta
    assert sorted(p.name for p in among.iterdir()) == sorted(
        p.name for p in alone.iterdir() if p.name != ".lock"
    )


def test_each_program_compiles_once(together):
    """For all runs, iterations and evaluations, and nothing compiles after the start."""
    *_, compiled, late = together
    learner_s = ("split_rows", "select_rows", "make_minibatches", "update", "finish_iteration")
    for program in ("convert", "batch_of", *learner_s):
        assert compiled.names[program] == 1, compiled.names
    assert late.count == 0


def test_every_run_has_its_own_values(together):
    """Runs of other seeds and learning rates differ, from the first iteration on."""
    workdir, cohort, bar, *_ = together
    first = [read_metrics(workdir / name)[1] for name in cohort.names]
    assert len({r["policy/loss"] for r in first}) == 3
    rates = [r["learning_rate"] for r in first]
    np.testing.assert_allclose(rates, [0.8e-4, 1e-4, 1.2e-4], rtol=1e-6)
    assert bar.steps == 30
    means = [r["reward/mean"] for r in (read_metrics(workdir / n)[-1] for n in cohort.names)]
    assert bar.shown[-1]["reward/mean"] == pytest.approx(np.mean(means))


@pytest.mark.slow
def test_a_population_goes_on_where_it_stopped(together, tmp_path):
    """5 iterations, then again for 10: one checkpoint holds parameters and positions of all."""
    (short,) = cohorts.make(base(iterations=5), RUNS)
    schedule.run_cohort(short, tmp_path, Bar())
    whole, cohort, *_ = together
    bar = Bar()
    schedule.run_cohort(cohort, tmp_path, bar)
    assert bar.steps == 30
    for name in cohort.names:
        assert records(tmp_path / name) == records(whole / name)
    state, wanted = (final_state(w / cohort.names[2], cohort.runs[2])[0] for w in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_a_directory_of_another_population_is_refused(together):
    workdir, cohort, *_ = together
    (other,) = cohorts.make(base(**{"advantages": "mean"}), RUNS)
    with pytest.raises(ValueError, match="advantages: stored 'group', given 'mean'"):
        schedule.run_cohort(other, workdir, Bar())
    assert other.names == cohort.names


def rows_of(checked, seed):
    """A rollout of random completions of the next prompts, as the sampler would return it."""
    rng = np.random.default_rng(seed)
    stream = experience.open_stream(checked)
    asked = experience.next_query(checked, stream, rewards.Scorer(checked.task))
    b, s = checked.sampled, checked.width + checked.max_new_tokens
    group_size = checked.config.batch.group_size
    length_B1 = np.repeat(asked.prompts.length, group_size)[:, None]
    count_B1 = rng.integers(1, checked.max_new_tokens, (b, 1))
    count_B1[: 3 * group_size] = 5  # three groups whose rewards are all equal
    mask_BS = (np.arange(s) >= length_B1) & (np.arange(s) < length_B1 + count_B1)
    logp_BS = np.where(mask_BS, -rng.random((b, s)), 0).astype(np.float32)
    return Rollout(
        tokens=rng.integers(2, 8, (b, s)).astype(np.int32),
        mask=mask_BS,
        sampler_logp=logp_BS,
        prompt_id=np.repeat(asked.prompts.id, group_size),
        sample_index=np.tile(np.arange(group_size, dtype=np.int32), b // group_size),
        policy_step=np.ones(b, np.int32),
        finished=np.zeros(b, np.int32),
        segments=(np.arange(s) < length_B1 + count_B1).astype(np.int32),
    )


@pytest.fixture
def given(monkeypatch):
    """Two runs whose engines sample what they are given; the runs, and whether each has sampled."""
    fields = {"batch.oversample": 2, "batch.prompts": 6}
    (cohort,) = cohorts.make(base(**fields), axes.axis("seed", 3, 4))
    drawn = [rows_of(checked, seed) for seed, checked in enumerate(cohort.runs)]
    sampled = [threading.Event() for _ in drawn]

    def rollout(self, weights, prompts, on_groups, **_):
        index = [cohort.runs.index(run) for run in self.runs]
        rows = [drawn[i] for i in index]
        for groups, own in zip(on_groups, rows, strict=True):
            rollouts.report(groups, own, 4)
        for i in index:
            sampled[i].set()
        return jax.device_put(self.join(rows)), [Ends(x.mask.sum(-1), x.finished, 0) for x in rows]

    for kind in (Population, Streamed):
        monkeypatch.setattr(kind, "to_sampler", lambda *_: None)
        monkeypatch.setattr(kind, "rollout", rollout)
    return cohort, sampled


def bundle_of(engine):
    streams = tuple(map(experience.open_stream, engine.runs))
    return Bundle(engine, TrainState(None, None, None, None), None, streams)


def test_dynamic_sampling_is_that_of_the_run_alone(given):
    """Twice the prompts are drawn; of each run, its own first informative groups are kept.

    Rows chosen by another run's rewards, or masks that are not carried along, would show.
    """
    cohort, _ = given
    with rewards.Scorer(cohort.lead.task, cohort.lead.recipe) as scorer:
        both = bundle_of(Population(cohort.runs, "vmap"))
        got = experience.from_rollout(both, 1, Clock(), scorer)()
        for r, checked in enumerate(cohort.runs):
            own = experience.from_rollout(bundle_of(Streamed(checked)), 1, Clock(), scorer)()
            assert got.metrics[r] == own.metrics[0]
            assert got.samples[r] == own.samples[0]
            for among, alone in zip(got.minibatches, own.minibatches, strict=True):
                jax.tree.map(np.testing.assert_array_equal, pick(among, r), alone)
    assert own.metrics[0]["advantage/kept_groups"] == 1
    assert own.metrics[0]["advantage/zero_groups"] == 3 / 12


def test_the_next_run_is_sampled_while_rows_are_judged(given, monkeypatch):
    """The verdicts on the first run wait for it; a loop that waits for them first would stand."""
    (cohort, (_, second)), judge = given, rewards.judge

    def waits(*arguments):
        assert second.wait(60)
        return judge(*arguments)

    monkeypatch.setattr(rewards, "judge", waits)
    monkeypatch.setattr(Streamed, "learn", lambda _, state, *more: (state, [{}]))
    with rewards.Scorer(cohort.lead.task, cohort.lead.recipe) as scorer:
        bundles = [bundle_of(Streamed(checked)) for checked in cohort.runs]
        _, found, _ = train._iterate(bundles, 1, Clock(), scorer)
    assert [r["iteration"] for r in found] == [1, 1]


def arguments_of(policies, seed, live_R=(True, True)):
    """What `rollouts.rollout` takes, for one policy or two."""
    config, weights = policies
    return (
        np.array(live_R), to_sampler(stack(weights), config), config,
        stack([fakes.prompts(P, N)] * len(weights)),
        sampling.base_key(np.full(len(weights), seed, np.uint32), "train", np.int32(3)),
        stack([sampling.controls(1.0)] * len(weights)), np.int32(3),
    )  # fmt: skip


@pytest.mark.slow
def test_vmap_samples_the_same_up_to_near_ties(peaked):
    """Two policies at once, through three sizes of the cache: rows leave at near-ties only.

    The warm-up samples runs that are not live: they end with their first token.
    """
    config, weights = peaked
    policies = [weights, fakes.perturbed(weights, 0.01, seed=2)]
    static = {
        "group_size": G,
        "max_new_tokens": T,
        "cache": (3, 9, T),
        "truncate": False,
        "rows": 2,
    }
    among, steps_R = jax.device_get(
        rollouts.rollout(*arguments_of((config, policies), 11), **static)
    )
    assert T < steps_R[0] == steps_R[1] <= G * T  # completions that flowed through two rows
    dead, _ = rollouts.rollout(*arguments_of((config, policies), 11, (True, False)), **static)
    np.testing.assert_array_equal(dead.mask[0], among.mask[0])
    assert dead.mask[1].sum(-1).max() == 1
    for r, policy in enumerate(policies):
        alone, other = roll((config, policy), fakes.prompts(P, N)), pick(among, r)
        differs = np.flatnonzero((other.tokens != alone.tokens).any(-1))
        assert len(differs) <= 0.01 * len(other.tokens)
        for row in differs:
            at = int(np.argmax(other.tokens[row] != alone.tokens[row]))
            drawn = (fakes.prompts(P, N), (alone.prompt_id[row], alone.sample_index[row]))
            best = perturbed_logits((config, policy), alone.tokens[row], *drawn, at, 1.0)
            assert best[-1] - best[-2] < 1e-3
        same = np.setdiff1d(np.arange(len(other.tokens)), differs)
        np.testing.assert_array_equal(other.mask[same], alone.mask[same])
        np.testing.assert_array_equal(other.finished[same], alone.finished[same])
        np.testing.assert_allclose(other.sampler_logp[same], alone.sampler_logp[same], atol=2e-5)


def test_vmap_of_decoding_selects_no_caches(peaked):
    """A loop whose predicate has the axis R would copy every cache at each step by a select."""
    config, weights = peaked
    static = {"group_size": G, "max_new_tokens": T, "cache": (T,), "truncate": False, "rows": G}
    arguments = arguments_of((config, [weights, weights]), 0)
    text = rollouts.rollout.trace(*arguments, **static).lower().as_text()
    cache = f"2x{P * G}x{config.num_key_value_heads}x{T}x{config.head_dim}xf32"
    assert cache in text
    selected = [line for line in text.splitlines() if "stablehlo.select" in line and cache in line]
    scattered = [line for line in text.splitlines() if "scatter" in line and cache in line]
    assert not selected
    assert not scattered


@pytest.mark.slow
def test_the_first_update_under_vmap(together):
    """To 1e-5, with other learning rates and temperatures of the gate."""
    cohort = together[1]
    states = [learner.init(params.init(r.model, r.config.seed), r.hp) for r in cohort.runs]
    given = [rows_of(checked, seed) for seed, checked in enumerate(cohort.runs)]
    batches = []
    for rollout in given:
        batch = jax.tree.map(lambda x: x[:16], experience.batch_of(rollout))
        advantages = np.random.default_rng(3).standard_normal(16).astype(np.float32)
        batches.append(batch.replace(advantages=advantages))
    arguments = (stack(states), stack(batches), hyperparameters(cohort.runs))
    update, before = vmapped(learner.update, None, (0,)), stack(states)
    after, metrics = jax.device_get(update(*arguments))
    lost = [*batches[:2], batches[2].replace(advantages=np.full(16, np.nan, np.float32))]
    beside, _ = jax.device_get(update(before, stack(lost), arguments[2]))
    wanted = stack([pick(after, 0), pick(after, 1), pick(before, 2)])
    jax.tree.map(np.testing.assert_array_equal, beside, wanted)
    for r, (state, batch, checked) in enumerate(zip(states, batches, cohort.runs, strict=True)):
        start = jax.device_get(state.params)
        wanted, own = jax.device_get(learner.update(state, batch, checked.hp))
        moved = jax.tree.map(np.subtract, pick(after, r).params, start)
        expected = jax.tree.map(np.subtract, wanted.params, start)
        largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), moved, expected)
        assert largest > 5e-5
        np.testing.assert_allclose(
            pick(metrics, r)["grad/norm"].numerator, own["grad/norm"].numerator, rtol=1e-5
        )
    batches[1] = batches[1].replace(mask=np.zeros_like(batches[1].mask))  # nothing to learn from
    again = vmapped(learner.update, None, (0,))(after, stack(batches), arguments[2])[0]
    for r in range(3):
        kept = jax.tree.map(np.array_equal, pick(jax.device_get(again), r), pick(after, r))
        assert all(jax.tree.leaves(kept)) == (r == 1)


def test_a_run_that_is_not_finite_stops_alone(together, tmp_path):
    """The runs beside it end as ever; the same command does not start it again."""
    rates = axes.axis("learner.learning_rate", 1e-4, 1e20)
    times = {"iterations": 4, "eval.every": 4, "checkpoint.every": 1}
    parts = cohorts.make(base(**times), rates)
    for _ in range(2):
        assert schedule.run(parts, tmp_path)
        said = schedule.stopped(parts, tmp_path)
        assert re.fullmatch(r".*=1e\+20: iteration 2, minibatch 2: 3 updates in a row .*", said)
    healthy, lost = (tmp_path / "cohort-000" / name for name in parts[0].names)
    assert [r["update/skipped"] for r in read_metrics(healthy)[1:]] == [0, 0, 0, 0]
    assert (healthy / "checkpoints" / "4").exists()
    assert [r["update/skipped"] for r in read_metrics(lost)[1:]] == [1, 2]
    assert not (lost / "checkpoints").exists()


def test_a_switch_gives_each_run_its_own_objective(rng):
    """Loss and gradient of each run are those of its own objective."""
    logp, old = (-rng.random((4, 6)).astype(np.float32) for _ in range(2))
    advantages, mask = rng.standard_normal(4).astype(np.float32), rng.random((4, 6)) < 0.8
    runs = axes.zip_(
        axes.axis("objective.name", "sapo", "gspo", "dr_grpo", "sapo"),
        axes.axis("objective.tau_neg", 3.0, None, None, None),
        axes.axis("objective.tau_pos", None, None, None, 0.5),
        axes.axis("objective.max_length", None, None, 6.0, None),
    )
    (cohort,) = cohorts.make(base(), runs)

    def loss(logp, objective):
        return objectives.policy_loss(objective, logp, old, advantages, mask)[0]

    one = jax.value_and_grad(loss)
    all_R = hyperparameters(cohort.runs).objective
    found = jax.jit(jax.vmap(one, (None, 0)))(logp, all_R)
    for r, checked in enumerate(cohort.runs):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
            pick(found, r),
            one(logp, checked.hp.objective),
        )


@pytest.mark.slow
def test_a_population_by_vmap_goes_on_where_it_stopped(tmp_path):
    """A cohort of two objectives, whole and in two parts: bit for bit, and nothing compiles late.

    Both runs learn, each by its own objective and in its own directory, and have two evaluations.
    """
    fields = {"population.method": "vmap", "model.num_hidden_layers": 1, "checkpoint.every": 1}
    fields["evals"] = {"own": {}, "few": {"prompts": 4, "samples": 2}}
    times = {"eval.every": 1, "batch.minibatches": 1, "sampler.max_new_tokens": 24}
    runs = axes.product(axes.axis("objective.name", "sapo", "grpo"), axes.axis("seed", 3))
    late, warm_up = fakes.Compilations(), startup.warm_up

    def counted(*arguments):
        warm_up(*arguments)
        late.__enter__()

    def trained(iterations, place):
        (cohort,) = cohorts.make(base(**fields, **times, iterations=iterations), runs)
        schedule.run_cohort(cohort, place, Bar())
        return cohort

    trained(1, tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "warm_up", counted)
        cohort = trained(2, tmp_path / "parts")
    late.__exit__()
    assert late.count == 0
    trained(2, tmp_path / "whole")
    for name, checked in zip(cohort.names, cohort.runs, strict=True):
        places = [tmp_path / whole / name for whole in ("parts", "whole")]
        found, expected = map(records, places)
        assert found == expected
        assert [r["iteration"] for r in found] == [0, 1, 2]
        assert all(r["grad/norm"] > 0 for r in found[1:])
        (state, meta), (wanted, wanted_meta) = (final_state(place, checked) for place in places)
        jax.tree.map(np.testing.assert_array_equal, state, wanted)
        assert meta == wanted_meta
    sapo, grpo = (records(tmp_path / "whole" / name)[1] for name in cohort.names)
    assert sapo["reward/mean"] == grpo["reward/mean"]
    assert sapo["policy/loss"] != grpo["policy/loss"]
    assert {"eval/pass_at_1", "eval/own/pass_at_1", "eval/few/pass_at_1"} <= set(sapo)


@pytest.mark.slow
def test_a_population_on_eight_devices():
    """`eight_runs.py`, in a process whose CPU counts as eight devices."""
    fakes.on_eight_devices("tests/sweep/eight_runs.py")


@pytest.fixture(scope="module")
def swept(together, tmp_path_factory):
    """A sweep of two cohorts of three, without interruption, and what the second one compiled."""
    workdir = tmp_path_factory.mktemp("swept")
    parts = cohorts.make(tiny_sweep.get_config(), tiny_sweep.get_sweep(), most=3)
    assert schedule.run(parts[:1], workdir / "first")
    with fakes.Compilations() as compiled:
        assert schedule.run(parts, workdir / "whole")
    return workdir / "whole", parts, compiled


@pytest.mark.slow
def test_cohorts_of_one_size_share_their_programs(swept):
    assert swept[2].count == 0


class KilledError(Exception):
    """Stands for SIGKILL; tests/sweep/test_sweep.py has the real one, which is slow."""


def kill(patch, module, name, calls):
    """The function raises at the call of that number."""
    function, left = getattr(module, name), [calls]

    def dies(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KilledError
        return function(*arguments, **options)

    patch.setattr(module, name, dies)


KILLS = [
    (step, "update", 3),  # in the first iteration, before any checkpoint
    (step, "update", 23),  # of the second run in iteration 4, after the checkpoint of iteration 2
    (startup, "read_metrics", 2),  # between the last checkpoints of the first cohort's runs
    (train, "report", 3),
    (train, "write_samples", 5),  # in the second cohort
]


def asked(patch, module, name, calls):
    """SIGTERM arrives in the call of that number."""
    function, left = getattr(module, name), [calls]

    def with_signal(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    patch.setattr(module, name, with_signal)


ASKED = [
    ("update", 12, "1"),  # of the second run in iteration 2, when the first has lost its buffers
    ("update", 5, "1"),  # the same, when nothing new is to be saved
    ("finish_iteration", 9, "3"),
]


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_keeps_what_is_finished(swept, tmp_path):
    """In the middle of updates, before which the states of all runs were copied; and at the end
    every run is as if nothing had happened."""
    whole, (part, _), _ = swept
    for name, calls, saved in ASKED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stopping, "SHORT", 0.0)  # so that all iterations are long
            asked(patch, step, name, calls)
            with pytest.raises(cli.Stopped, match="143"):
                schedule.run_cohort(part, tmp_path, Bar())
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [saved]
    schedule.run_cohort(part, tmp_path, Bar())
    for name in part.names:
        assert records(tmp_path / name) == records(whole / "cohort-000" / name)


def test_a_killed_sweep_loses_and_repeats_nothing(swept, tmp_path):
    """Killed five times, then left alone: every run as if nothing had happened, none done twice."""
    whole, parts, _ = swept
    for module, name, calls in KILLS:
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, module, name, calls)
            with pytest.raises(KilledError):
                schedule.run(parts, tmp_path)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "cohort-000").rglob("part-*.jsonl")}
    assert len({p.parents[1] for p in first}) == 3
    assert schedule.run(parts, tmp_path)
    listed = json.loads((tmp_path / "manifest.json").read_text())["runs"]
    assert [run["overrides"] for run in listed] == tiny_sweep.get_sweep()
    for run in listed:
        found = records(tmp_path / run["directory"])
        assert [r["iteration"] for r in found] == list(range(5))
        assert found == records(whole / run["directory"])
        assert digest(tmp_path / run["directory"]) == digest(whole / run["directory"])
        assert (tmp_path / run["directory"] / "report.html").exists()
    assert {p: p.stat().st_mtime_ns for p in first} == first


@pytest.mark.slow
def test_a_deleted_run_is_noticed_and_repeated(swept, tmp_path):
    """Of a sweep that had ended nothing was looked at; a run of a map comes back bit for bit."""
    whole, parts, _ = swept
    shutil.copytree(whole, tmp_path / "sweep")
    deleted, cut = (tmp_path / "sweep/cohort-000" / parts[0].names[r] for r in (1, 2))
    before = records(deleted), records(cut)
    shutil.rmtree(deleted)
    shutil.rmtree(cut / "metrics")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, train, "write_samples", 2)
        with pytest.raises(KilledError):
            schedule.run(parts, tmp_path / "sweep")
    assert schedule.run(parts, tmp_path / "sweep")
    assert (records(deleted), records(cut)) == before
    assert digest(deleted) == digest(whole / deleted.relative_to(tmp_path / "sweep"))


def test_a_sweep_is_restricted_by_its_values():
    sweep = tiny_sweep.get_sweep()
    assert cohorts.restrict(sweep, []) == sweep
    found = cohorts.restrict(sweep, ["seed=3,5", "objective.tau_neg=2"])
    assert found == [{"objective.tau_neg": 2.0, "seed": seed} for seed in (3, 5)]
    for text, message in (
        ("seed=7", "--axis=seed=7: no run has seed=7; they have 3, 4, 5"),
        ("sed=3", "--axis=sed=3: must be FIELD=VALUE,… of a field of the sweep, which are obj"),
        ("seed", "--axis=seed: no run has seed=; they have 3, 4, 5"),
    ):
        with pytest.raises(ValueError, match=message):
            cohorts.restrict(sweep, [text])
    apart = axes.zip_(axes.axis("seed", 1, 2), axes.axis("learner.b1", 0.8, 0.9))
    with pytest.raises(ValueError, match=r"learner.b1=0.9: no run has learner.b1=0.9; .* 0.8"):
        cohorts.restrict(apart, ["seed=1", "learner.b1=0.9"])


def test_the_bar_moves_while_the_runs_of_a_map_train(together):
    """Run by run, not once an iteration of all of them; and says at which of them it is."""
    _, cohort, bar, _, _ = together
    assert bar.steps == 30
    assert bar.moved.count(1) == 30
    for doing in ("sampling", "updating", "evaluating"):
        assert f"{doing} run 2 of {len(cohort.runs)}" in bar.notes


@pytest.mark.slow
def test_jobs_share_a_sweep(swept, tmp_path, monkeypatch):
    """Each job does its cohorts; the sweep is complete when both have ended."""
    whole, parts, _ = swept
    assert not schedule.run(parts, tmp_path, job=(1, 2))
    assert not (tmp_path / "cohort-000").exists()
    trained = []

    def taken(cohort, place, bar):  # what it would train once more
        trained.append((cohort, place.name))
        shutil.copytree(whole / place.name, place)

    monkeypatch.setattr(schedule, "run_cohort", taken)
    assert schedule.run(parts, tmp_path, job=(0, 2))
    assert trained == [(parts[0], "cohort-000")]
    for run in json.loads((tmp_path / "manifest.json").read_text())["runs"]:
        assert records(tmp_path / run["directory"]) == records(whole / run["directory"])


def test_a_directory_of_another_sweep_is_refused(swept, tmp_path):
    whole, parts, _ = swept
    with pytest.raises(ValueError, match=r"has 6 runs, given are 3, .*'cohort-001/"):
        schedule.run(parts[:1], whole)
    with Lease(tmp_path / "cohort-000"), pytest.raises(RuntimeError, match="in use"):
        schedule.run(parts, tmp_path)
