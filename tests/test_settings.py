"""Wrong configs are refused with the field, its value and what is allowed, before any compile."""

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from sapo_jax import settings
from tests import fakes, tiny_config


def changed(fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


WRONG = [
    ({"objective.name": "sap"}, "'sap'", "nearest is 'sapo'"),
    ({"objective.tau_neg": -1.0}, "tau_neg=-1.0", "> 0"),
    ({"objective.tau_pos": 0.0}, "tau_pos=0.0", "> 0"),
    ({"objective.name": "grpo", "objective.tau_pos": 1.0}, "'tau_pos'", "eps_low, eps_high"),
    ({"objective.eps_low": 0.1}, "'eps_low'", "tau_pos, tau_neg"),
    ({"objective.name": "dr_grpo"}, "'max_length'", "≥ 1"),
    ({"objective.aggregation": "mean"}, "'mean'", "token_mean"),
    ({"objective.kl": "k9"}, "'k9'", "k1, k2, k3"),
    ({"objective.kl_coef": 0.1}, "kl_coef=0.1", "init_from"),
    ({"source": "rollouts"}, "'rollouts'", "nearest is 'rollout'"),
    ({"source": "demonstrations"}, "'sapo'", "'reinforce'"),
    ({"advantages": "grop"}, "'grop'", "nearest is 'group'"),
    ({"batch.group_size": 1}, "group_size=1", "at least 2"),
    ({"batch.group_size": 0}, "group_size=0", "at least 1"),
    ({"batch.prompts": 7}, "prompts=7", "multiple of batch.minibatches=2"),
    ({"batch.micro_batches": 3}, "micro_batches=3", "divisor of 16"),
    ({"sampler.slots": 9}, "slots=9", "at most batch.prompts=8"),
    ({"sampler.temperature": 0.0}, "temperature=0.0", "greater than 0"),
    ({"sampler.max_new_tokens": -1}, "max_new_tokens=-1", "at least 0"),
    ({"model.preset": "tini"}, "'tini'", "nearest is 'tiny'"),
    ({"model.num_attention_heads": 3}, "num_attention_heads=3", "multiple of"),
    ({"model.max_position_embeddings": 6}, "max_position_embeddings=6", "at least"),
    ({"dtype.compute": "float16"}, "'float16'", "float32, bfloat16"),
    ({"task.name": "chainsum"}, "'chainsum'", "chain_sum"),
    ({"task.options.terms": 1}, "terms", ">= 2"),
    ({"task.options.colour": 1}, "'colour'", "terms"),
    ({"learner.schedule": "cosin"}, "'cosin'", "nearest is 'cosine'"),
    ({"learner.old_logp": "sample"}, "'sample'", "nearest is 'sampler'"),
    ({"learner.learning_rate": -1e-3}, "learning_rate=-0.001", "at least 0"),
    ({"learner.b2": 1.0}, "b2=1.0", r"\[0, 1\)"),
    ({"learner.max_grad_norm": 0.0}, "max_grad_norm=0.0", "greater than 0"),
    ({"iterations": 0}, "iterations=0", "at least 1"),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"eval.top_p": 1.5}, "top_p=1.5", r"\(0, 1\]"),
    ({"eval.top_k": 0}, "top_k=0", "at least 1"),
    ({"checkpoint.every": 0}, "checkpoint.every=0", "at least 1"),
]


@pytest.mark.parametrize(("fields", "value", "allowed"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_configs_are_refused(fields, value, allowed):
    with fakes.Compilations() as compilations, pytest.raises(ValueError, match=allowed) as refusal:
        settings.resolve(changed(fields))
    assert value in str(refusal.value)
    assert compilations.count == 0


def test_the_defaults_are_accepted():
    checked = settings.resolve(tiny_config.get_config())
    assert checked.rows == 32
    assert checked.hp.objective.hyperparameters == {"kl_coef": 0.0, "tau_pos": 1.0, "tau_neg": 1.05}


def main(*arguments):
    command = [sys.executable, "-m", "sapo_jax.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


FLAGS = [
    (["--config.lerner.schedule=linear"], "lerner", "learner"),
    (["--config.learner.learning_rat=0.1"], "learning_rat", "learning_rate"),
    (["--config.batch.prompts=many"], "many", "batch.prompts"),
    (["--config.objective.tau_neg=-1"], "tau_neg=-1.0", "> 0"),
    (["learning_rate=3"], "learning_rate=3", "--config.<field>=<value>"),
]


@pytest.mark.parametrize(("flags", "value", "allowed"), FLAGS, ids=[f[0][0] for f in FLAGS])
def test_wrong_flags_are_refused(flags, value, allowed, tmp_path):
    """On the command line too: one message, no traceback, no run directory."""
    workdir = tmp_path / "run"
    code, text = main("--config=tests/tiny_config.py", f"--workdir={workdir}", *flags)
    assert code != 0
    assert value in text
    assert allowed in text
    assert "Traceback" not in text
    assert not workdir.exists()


def test_a_config_is_locked():
    """A misspelt field in a config file is an error, not a new field."""
    config = tiny_config.get_config()
    with pytest.raises(AttributeError, match="learner"):
        config.lerner = ConfigDict()
