"""Runs with LoRA: resume, the base, exports, populations over one base."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy

from sapo_jax import axes, export, learner, model, train
from sapo_jax.learner import step
from sapo_jax.model import lora, peft
from sapo_jax.sweep import cohorts, population, schedule
from sapo_jax.training import parameters, settings, startup
from sapo_jax.training.checkpoint import Checkpoints
from sapo_jax.training.workdir import write_config
from tests import tiny_config
from tests.oracles import drawn
from tests.sweep.test_population import Bar, KilledError, kill
from tests.test_export import evaluated
from tests.test_train import SHAPED, digest, records, spawn

pytestmark = pytest.mark.usefixtures("no_plots")
SMALL = {"model.num_hidden_layers": 1, "sampler.slots": 0, "log.samples_every": 1}
LORA = SMALL | SHAPED | {
    "lora.rank": 3, "lora.alpha": 6.0, "learner.learning_rate": 3e-3, "learner.weight_decay": 0.1,
    "iterations": 4, "eval.every": 2, "checkpoint.every": 2,
    "objective.kl_coef": 0.1, "learner.old_logp": "recompute",
}  # fmt: skip


def config_of(**fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def run(workdir, **fields):
    checked = settings.from_config(config_of(**fields))
    train.run(checked, workdir)
    return checked


def full_run(workdir, seed):
    """The directory of a run of all parameters, which it left as they were drawn."""
    checked = settings.from_config(config_of(**SMALL, seed=seed))
    write_config(workdir, checked.plain)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, learner.init(parameters.random(checked), checked.hp), {})
    return workdir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return full_run(tmp_path_factory.mktemp("base") / "run", seed=5)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return run(workdir, **LORA, init_from=str(base)), workdir


def state_of(workdir, checked):
    checkpoints = Checkpoints(workdir / "checkpoints")
    return jax.device_get(checkpoints.restore(checkpoints.latest(), learner.abstract(checked.hp)))


def same_states(first, second):
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])
    assert first[1] == second[1]


def test_a_run_learns_adapters_and_saves_nothing_else(alone):
    """The reference of its KL penalty is the base: no KL before the first update."""
    checked, workdir = alone
    state, meta = state_of(workdir, checked)
    names = {f"{name}{end}" for name in checked.model.lora_targets for end in (lora.A, lora.B)}
    assert set(state.params) == {"layers"}
    assert set(state.params["layers"]) == names
    assert all(np.any(x) for x in jax.tree.leaves(state.params))
    assert set(meta) == {"position", "reference"}
    lines = records(workdir)
    assert lines[1]["minibatch"][0]["policy/kl_ref"] == pytest.approx(0, abs=1e-9)
    assert lines[4]["policy/kl_ref"] > 1e-3
    assert all(r["sampler/logp_gap_max"] <= 1e-5 for r in lines[1:])
    assert lines[4]["reward/mean"] > lines[1]["reward/mean"]


def test_a_run_goes_on_where_it_stopped(alone, base, tmp_path):
    checked, workdir = alone
    run(tmp_path / "run", **LORA | {"iterations": 2}, init_from=str(base))
    run(tmp_path / "run", **LORA, init_from=str(base))
    assert records(tmp_path / "run") == records(workdir)
    assert digest(tmp_path / "run") == digest(workdir)
    same_states(state_of(tmp_path / "run", checked), state_of(workdir, checked))


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["rollout 3", "minibatch 4", "checkpoint 2"])
def test_a_killed_run_ends_like_an_uninterrupted_one(stop, alone, base, tmp_path):
    """By SIGKILL, as tests/test_train.py has it for a run of all parameters."""
    checked, workdir = alone
    fields = LORA | {"init_from": str(base)}
    assert spawn(tmp_path / "run", stop, **fields).wait() == -signal.SIGKILL
    run(tmp_path / "run", **fields)
    assert records(tmp_path / "run") == records(workdir)
    same_states(state_of(tmp_path / "run", checked), state_of(workdir, checked))


def test_another_base_is_refused(alone, base, tmp_path):
    """Adapters on another base are another policy."""
    _, workdir = alone
    place = tmp_path / "run"
    shutil.copytree(workdir, place)
    other = tmp_path / "base"
    stored = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(stored | {"init_from": str(other)}))
    full_run(other, seed=9)
    message = r"init_from=.*base' is not the reference that the run started with"
    with pytest.raises(ValueError, match=message):
        run(place, **LORA, init_from=str(other))
    with pytest.raises(ValueError, match=message):
        export.export(place, tmp_path / "policy")


@pytest.mark.slow
def test_policies_leave_a_run(alone, base, tmp_path):
    """Merged, as a directory and as what another run starts from; and evaluated as they are."""
    checked, workdir = alone
    export.export(workdir, tmp_path / "policy")
    shape, merged = model.hf.load(tmp_path / "policy")
    policy = parameters.learnt(checked, workdir, 4)
    tokens = drawn.tokens(shape.vocab_size)
    expected = np.asarray(model.logits(policy, checked.model, tokens))
    got = np.asarray(model.logits(merged, shape, tokens))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    found = evaluated(tmp_path / "own.json", f"--workdir={workdir}")["sets"]
    (found,) = found.values()
    assert found.pop("eval/prompts") == checked.config.eval.prompts
    assert found == {key: records(workdir)[-1][key] for key in found}
    full = settings.from_config(config_of(**LORA | {"lora.rank": None}, init_from=str(workdir)))
    again, origin = parameters.first(full)
    jax.tree.map(np.testing.assert_array_equal, again, lora.merge(policy))
    assert origin["checkpoint"] == 4


def test_adapters_leave_a_run(alone, base, tmp_path):
    checked, workdir = alone
    for _ in range(2):  # an earlier export is replaced
        export.export_adapters(workdir, tmp_path / "adapters")
    tensors = safetensors.numpy.load_file(tmp_path / "adapters" / peft.WEIGHTS)
    learnt = state_of(workdir, checked)[0].params["layers"]
    (key,) = (k for k in tensors if "o_proj.lora_A" in k)
    np.testing.assert_array_equal(tensors[key], learnt["o_lora_a"][0].reshape(-1, 3).T)
    with pytest.raises(ValueError, match="is not of an earlier export of this shape"):
        export.export(workdir, tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"has none: its config\.lora\.rank is None"):
        export.export_adapters(base, tmp_path / "none")


def population_of(base, method, **fields):
    runs = axes.zip_(axes.axis("seed", 0, 3), axes.axis("lora.alpha", 6.0, 12.0))
    start = {"init_from": str(base), "population.method": method}
    return cohorts.make(config_of(**LORA | start | fields), runs)


@pytest.mark.slow
def test_a_population_by_map_is_its_runs_alone(alone, base, tmp_path):
    """Killed in an update, and then left alone: two adapters over one base."""
    checked, workdir = alone
    (cohort,) = population_of(base, "map")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, step, "update", 2 + 2 * 2 * 2 + 3)  # of the second run, in iteration 3
        with pytest.raises(KilledError):
            schedule.run_cohort(cohort, tmp_path, Bar())
    schedule.run_cohort(cohort, tmp_path, Bar())
    first, second = (tmp_path / name for name in cohort.names)
    assert records(first) == records(workdir)
    assert digest(first) == digest(workdir)
    same_states(state_of(first, checked), state_of(workdir, checked))
    assert records(second)[1]["policy/loss"] != records(first)[1]["policy/loss"]


@pytest.mark.slow
def test_a_population_by_vmap_holds_one_base(alone, base, tmp_path):
    """The first iteration of each run is that of the run alone, by programs with one base."""
    (cohort,) = population_of(base, "vmap", iterations=1, **{"eval.every": 0})
    engine = population.Population(cohort.runs, "vmap")
    with Checkpoints(tmp_path / "none") as checkpoints:
        (bundle, other), _ = startup.start([engine, engine], checkpoints, alone=False)
    assert other.frozen is bundle.frozen
    assert bundle.frozen.params["embed"].ndim == 2
    assert bundle.state.params["layers"]["q_lora_a"].shape[0] == 2
    own, shared = engine.to_sampler(bundle.state.params, bundle.frozen)
    assert shared.params["layers"][0]["q"].ndim == 3
    assert set(own["layers"][0]) == set(bundle.state.params["layers"])
    schedule.run_cohort(cohort, tmp_path / "both", Bar())
    expected, got = records(alone[1])[1], records(tmp_path / "both" / cohort.names[0])[0]
    assert got["length/mean"] == expected["length/mean"]
    for key in ("policy/loss", "grad/norm", "policy/entropy", "policy/kl_ref"):
        assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)


def test_cohorts_share_base_and_shapes(base, tmp_path):
    """Rank and targets shape programs, and a base is held once for a cohort."""
    shutil.copytree(base, tmp_path / "base")
    fixed = config_of(**LORA, init_from=str(base))
    bases = str(base), str(tmp_path / "base")
    for field, values, count in (
        ("lora.alpha", (1.0, 2.0), 1), ("seed", (1, 2), 1), ("lora.rank", (2, 3), 2),
        ("lora.targets", (("q",), ("mlp",)), 2), ("init_from", bases, 2),
    ):  # fmt: skip
        assert len(cohorts.make(fixed, axes.axis(field, *values))) == count, field


def test_a_random_base_is_that_of_all_seeds():
    """Without init_from: the runs of a population over seeds have one base, too."""
    checked = [
        settings.from_config(config_of(**{**SMALL, "lora.rank": 2, "seed": s})) for s in (1, 2)
    ]
    (first, origin), (second, _) = map(parameters.first, checked)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert origin["checkpoint"] is None
    drawn_first, drawn_second = map(parameters.random, checked)
    assert np.any(drawn_first["layers"]["q_lora_a"] != drawn_second["layers"]["q_lora_a"])
    assert not np.any(drawn_first["layers"]["q_lora_b"])


REFUSED = [
    ({"lora.rank": 0}, r"lora.rank=0: must be at least 1 and at most model.hidden_size=64"),
    ({"lora.rank": -1}, r"lora.rank=-1: must be at least 1"),
    ({"lora.rank": 65}, r"lora.rank=65: must be .* at most model.hidden_size=64"),
    ({"lora.rank": 2, "lora.alpha": 0.0}, r"lora.alpha=0.0: must be greater than 0"),
    ({"lora.rank": 2, "lora.alpha": -1.0}, r"lora.alpha=-1.0: must be greater than 0"),
    ({"lora.rank": 2, "lora.targets": ("q", "keys")},
     r"lora.targets: 'keys' is no projection; there are q, k, v, o, gate, up, down; or attention"),
    ({"lora.rank": 2, "lora.targets": ("q,keys",)}, r"lora.targets: 'keys' is no projection"),
    ({"lora.rank": 2, "lora.targets": (1,)}, r"lora.targets=\[1\]: must be a list of texts"),
    ({"lora.targets": ("q",)}, r"lora.targets=\['q'\]: must be \(\) without config.lora.rank"),
    ({"dtype.params": "bfloat16"}, r"dtype.params='bfloat16': must be 'float32'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_makes_no_adapters_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        settings.from_config(config_of(**SMALL, **fields))
