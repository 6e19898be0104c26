"""The configs of the paper's experiments state what the paper does, and mark what it does not."""

import ast
import pathlib
import re

import pytest

from configs.paper import cold_start, controlled, multitask, qwen3_vl_30b_a3b, tau_neg
from sapo_jax import preflight
from sapo_jax.cli import flat
from sapo_jax.sweep import cohorts
from sapo_jax.training import settings


def on_one(module):
    """The config with stand-ins for data and weights, on one device."""
    c = preflight.stand_in(module.get_config())
    c.mesh.update(run=1, data=1, fsdp=1, tensor=1, expert=1)
    c.sampler.slots = 0
    return c


# What the paper states, by the section or figure that does; docs/paper.md has the sources.
SETTING = {
    "model.preset": "models/Qwen3-30B-A3B-Base", "tokenizer.directory": "models/Qwen3-30B-A3B-Base",
    "init_from": "runs/paper/cold_start", "source": "rollout", "advantages": "group",
    "objective.aggregation": None, "objective.kl_coef": None, "reward.kl_coef": 0.0,
    "reward.format": 0.0, "correction.name": "none", "learner.routing_replay": "none",
}  # fmt: skip
STATED = {
    controlled: SETTING | {"task.name": "math_answer", "batch.minibatches": 4, "eval.samples": 16},
    tau_neg: SETTING | {
        "objective.name": "sapo", "objective.tau_pos": 1.0, "batch.minibatches": 4,
        "eval.samples": 16,
    },
    multitask: SETTING | {"batch.minibatches": 2},
    qwen3_vl_30b_a3b: SETTING | {"batch.minibatches": 2} | dict.fromkeys(
        ("model.preset", "tokenizer.directory", "init_from"), "models/Qwen3-VL-30B-A3B"
    ),
}  # fmt: skip
MATHS = {"aime25": 16, "hmmt25": 16, "beyond_aime": 16}
EVALS = {  # sets and their samples; zebra's are ours
    controlled: MATHS, tau_neg: MATHS,
    multitask: {"aime25": 32, "livecodebench_v6": 8, "zebra": 8},
    qwen3_vl_30b_a3b: {"aime25": 32, "livecodebench_v6": 8, "zebra": 8, "mathvision": 8},
}  # fmt: skip
STEPS = {
    controlled: 1800,
    tau_neg: 1800,
    multitask: 500,
    qwen3_vl_30b_a3b: 500,
}  # gradient steps that are shown
ALGORITHMS = {  # hyperparameters, ratio, routing replay
    "sapo": ({"tau_pos": 1.0, "tau_neg": 1.05}, "token", "none"),
    "gspo": ({"eps_low": 3e-4, "eps_high": 4e-4}, "sequence", "none"),
    "grpo_r2": ({"eps_low": 0.2, "eps_high": 0.27}, "token", "R2"),
}


@pytest.mark.parametrize("experiment", STATED, ids=lambda module: module.__name__.split(".")[-1])
def test_paper_configs_state_what_the_paper_does(experiment):
    """Section 5.1 (Figures 4 and 5) and 5.2 (Figure 6); start, data and sizes it leaves open."""
    config = experiment.get_config()
    held = flat(config.to_dict())
    assert {key: held[key] for key in STATED[experiment]} == STATED[experiment]
    assert config.iterations * config.batch.minibatches == STEPS[experiment]
    samples = {name: e.get("samples", config.eval.samples) for name, e in config.evals.items()}
    assert samples == EVALS[experiment]
    if experiment in (controlled, tau_neg):
        assert config.eval.every * config.batch.minibatches == 100  # gradient steps, about
    c = on_one(experiment)
    runs = [run for cohort in cohorts.make(c, experiment.get_sweep()) for run in cohort.runs]
    taus = [run.hp.objective.hyperparameters.get("tau_neg") for run in runs]
    if experiment is tau_neg:
        assert taus == [1.05, 1.0, 0.95]
        return
    assert [run.config.objective.name for run in runs] == list(ALGORITHMS)
    for run, (expected, ratio, replay) in zip(runs, ALGORITHMS.values(), strict=True):
        objective = run.hp.objective
        assert expected.items() <= objective.hyperparameters.items()
        assert objective.hyperparameters["kl_coef"] == 0
        assert (objective.ratio, objective.aggregation) == (ratio, "seq_mean")
        assert run.hp.static.routing_replay == replay


def test_tasks_have_fixed_shares():
    """Maths, coding, logic, and images in every batch; each minibatch has some of all."""
    for module, more in ((multitask, set()), (qwen3_vl_30b_a3b, {"vision"})):
        config = module.get_config()
        assert set(config.tasks) == {"maths", "code", "logic"} | more
        for entry in config.tasks.values():
            assert (entry["share"] * config.batch.prompts / config.batch.minibatches) % 1 == 0


def test_the_cold_start_is_of_the_base_model():
    config = cold_start.get_config()
    assert config.init_from == config.model.preset == "models/Qwen3-30B-A3B-Base"
    assert (config.source, config.objective.name) == ("demonstrations", "reinforce")
    assert controlled.get_config().init_from == "runs/paper/cold_start"  # its --workdir
    assert "--workdir=runs/paper/cold_start" in cold_start.__doc__
    starts, goes_on = (on_one(module) for module in (cold_start, controlled))
    assert settings.from_config(starts).model == settings.from_config(goes_on).model


@pytest.mark.parametrize("module", [controlled, tau_neg, multitask, qwen3_vl_30b_a3b, cold_start])
def test_every_number_says_whose_it_is(module):
    """A number that no source states must not pass for the paper's."""
    source = pathlib.Path(module.__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("c."):
            line = source.splitlines()[node.end_lineno - 1]
            assert re.search(r"  # (paper|ours)\b", line), line
