"""The paper's controlled comparison (section 5.1, Figure 4): SAPO, GSPO and GRPO-R2 on maths.

Claim     The paper's: the baselines collapse after about 1370 of 1800 gradient steps, SAPO goes on
          (one run each). Before that GRPO-R2 equals or beats SAPO on two of its three sets.
Command   On every host of a v5p 4x4x8 slice (docs/pods.md), after configs/paper/cold_start.py; data
          as docs/paper.md says:
          python -m sapo_jax.sweep --config=configs/paper/controlled.py --workdir=gs://.../fig4
          trains the three runs one after the other, each on the whole slice; with
          --config.mesh.run=2 those that share their programs (SAPO and GSPO) side by side, each on
          half of it. A run alone: python -m sapo_jax.main --config=configs/paper/controlled.py \
              --config.objective.name=gspo --workdir=gs://.../gspo
Time      Not measured; by preflight at least 2.4 minutes an iteration (docs/pods.md).
Result    Not measured.

What no source states is marked as ours: optimizer, batch, group, lengths, temperature, data, seed.
"""

from ml_collections import ConfigDict

from configs.pod import qwen3_30b_a3b_v5p
from sapo_jax.axes import Overrides


def get_config() -> ConfigDict:
    c = qwen3_30b_a3b_v5p.get_config()
    c.unlock()
    c.name = "paper_controlled"  # ours
    del c.init_from  # which has the value of the next two
    c.model.preset = "models/Qwen3-30B-A3B-Base"  # paper: Base; sets tokenizer.directory, too
    c.init_from = "runs/paper/cold_start"  # paper: an SFT of it
    c.seed = 0  # ours
    c.task.name = "math_answer"  # paper: maths queries
    c.task.options = ConfigDict(
        {"train": "data/math/train.jsonl", "test": "data/math/test.jsonl"},
        type_safe=False,
    )  # ours
    c.objective.name = "sapo"  # paper
    c.batch.minibatches = 4  # paper
    c.iterations = 450  # paper: 1800 gradient steps are shown
    c.eval.every = 25  # paper: about every 100 gradient steps
    c.evals = evaluations(aime25=30, hmmt25=30, beyond_aime=100)  # paper: the sets
    c.eval.samples = 16  # paper
    c.eval.best = "mean"  # ours
    c.eval.temperature = 1.0  # ours
    c.batch.prompts = 128  # ours
    c.batch.group_size = 16  # ours
    c.data.max_prompt_tokens = 1024  # ours
    c.sampler.max_new_tokens = 7168  # ours
    c.sampler.temperature = 1.0  # ours
    c.advantages = "group"  # paper, Eq. 2
    c.learner.learning_rate = 1e-6  # ours
    c.learner.schedule = "constant"  # ours
    c.learner.weight_decay = 0.01  # ours
    c.learner.max_grad_norm = 1.0  # ours
    c.learner.old_logp = "recompute"  # ours; R2 needs it
    return c.lock()


def evaluations(**prompts: int) -> ConfigDict:
    """Sets of mathematics by name, with as many problems as each has."""
    found = {}
    for name, count in prompts.items():
        task = {"name": "math_answer", "options": {"test": f"data/paper/{name}.jsonl"}}
        found[name] = {"task": task, "prompts": count}
    return ConfigDict(found, type_safe=False)


def get_sweep() -> list[dict]:
    return comparison()


def comparison() -> Overrides:
    """The three algorithms, with the paper's settings; the baselines' are those of GSPO's paper."""
    return [
        {"objective.name": "sapo", "objective.tau_pos": 1.0, "objective.tau_neg": 1.05},
        {"objective.name": "gspo", "objective.eps_low": 3e-4, "objective.eps_high": 4e-4},
        {"objective.name": "grpo_r2", "objective.eps_low": 0.2, "objective.eps_high": 0.27},
    ]
