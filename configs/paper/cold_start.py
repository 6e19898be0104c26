"""The policy that the paper's comparisons start from: an SFT of Qwen3-30B-A3B-Base.

Claim     None: the paper starts from a cold-start checkpoint of the base model, and says neither by
          which data it was made nor how. All numbers here are ours.
Command   On every host of a v5p 4x4x8 slice (docs/pods.md), with Qwen/Qwen3-30B-A3B-Base in
          models/Qwen3-30B-A3B-Base and worked answers in data/cold_start (sapo-jax datasets):
          python -m sapo_jax.main --config=configs/paper/cold_start.py \
              --workdir=runs/paper/cold_start
Time      Not measured.
Result    Not measured.
"""

from ml_collections import ConfigDict

from configs.pod import qwen3_30b_a3b_v5p


def get_config() -> ConfigDict:
    c = qwen3_30b_a3b_v5p.get_config()
    c.unlock()
    c.name = "paper_cold_start"  # ours
    c.init_from = "models/Qwen3-30B-A3B-Base"  # paper: Base; sets model.preset, tokenizer.directory
    c.source = "demonstrations"  # paper: SFT
    c.objective.name = "reinforce"  # paper: SFT, whose likelihood is REINFORCE with advantage 1
    c.task.name = "prepared"  # ours
    c.task.options = ConfigDict(
        {"directory": "data/cold_start", "verifier": "boxed"}, type_safe=False
    )  # ours
    c.iterations = 500  # ours
    c.batch.prompts = 512  # ours
    c.batch.group_size = 1  # ours: one worked answer a problem
    c.batch.minibatches = 1  # ours
    c.batch.micro_batches = 4  # ours: 1 row of 8192 tokens on a chip
    c.learner.learning_rate = 1e-5  # ours
    c.learner.schedule = "cosine"  # ours
    c.learner.warmup = 20  # ours
    c.learner.old_logp = "sampler"  # ours: nothing is sampled
    c.eval.every = 100  # ours
    return c.lock()
