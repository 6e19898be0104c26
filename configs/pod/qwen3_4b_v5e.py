"""SAPO on Qwen3-4B, for 16 chips of TPU v5e: mathematics with checked answers.

Claim     None yet: this is the starting point of an ablation, with the paper's 4 minibatches a
          rollout. Another objective: --config.objective.name=grpo (or gspo, cispo, ...).
Command   On every host of a v5e 4x4 slice (docs/pods.md), with Qwen/Qwen3-4B in models/Qwen3-4B
          and JSON lines with "problem" and "answer" in data/math:
          python -m sapo_jax.main --config=configs/pod/qwen3_4b_v5e.py --workdir=gs://...
          Does it fit? python -m sapo_jax.preflight --config=configs/pod/qwen3_4b_v5e.py \
              --topology=v5e:4x4
Time      Not measured; by preflight at least 3 minutes an iteration.
Result    Not measured. Expected by preflight: 88% of a chip's memory, an update of 1.26 times the
          model's FLOPs with an MFU of at most 79%. docs/preflight.md has the rest.
"""

from ml_collections import ConfigDict, config_dict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.unlock()
    c.name = "qwen3_4b_v5e"
    directory = config_dict.FieldReference("models/Qwen3-4B")
    c.init_from = directory
    c.model.preset = directory
    c.tokenizer.directory = directory
    c.iterations = 500
    c.task.name = "math_answer"
    c.task.options = ConfigDict(
        {"train": "data/math/train.jsonl", "test": "data/math/test.jsonl"},
        type_safe=False,
    )
    c.data.max_prompt_tokens = 1024
    c.sampler.max_new_tokens = 3072

    c.dtype.compute = "bfloat16"  # parameters and moments stay in f32
    c.dtype.cache = "bfloat16"

    c.mesh.fsdp = -1  # 8 on 16 chips
    c.mesh.tensor = 2

    c.batch.prompts = 64
    c.batch.group_size = 16
    c.batch.minibatches = 4
    c.batch.micro_batches = 32  # 1 row of 4096 tokens on a chip
    c.sampler.slots = 20  # groups in flight: 160 rows on 8 chips
    c.sampler.mesh.tensor = 8  # 2 × 8: the weights are read from 8 chips, not from 2

    c.learner.learning_rate = 1e-6
    c.learner.weight_decay = 0.01
    c.learner.old_logp = "recompute"  # bf16: the sampler's log π differs from the learner's
    c.learner.remat = True

    c.eval.every = 20
    c.eval.prompts = 64
    c.eval.samples = 4
    c.checkpoint.every = 20
    return c.lock()
