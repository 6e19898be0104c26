"""SAPO on Qwen3-30B-A3B, for 128 chips of TPU v5p: a sparse policy, 8192 tokens a row.

Claim     None yet: the paper's setting (a 30B-A3B mixture of experts, 4 minibatches a rollout, no
          routing replay), where its figure compares SAPO with GSPO and GRPO with routing replay:
          --config.objective.name=gspo, or --config.objective.name=grpo_r2. Its own experiments
          are in configs/paper.
Command   On every host of a v5p 4x4x8 slice (docs/pods.md), with Qwen/Qwen3-30B-A3B in
          models/Qwen3-30B-A3B and JSON lines with "problem" and "answer" in data/math:
          python -m sapo_jax.main --config=configs/pod/qwen3_30b_a3b_v5p.py --workdir=gs://...
          On 64 chips (v5p:4x4x4) it fits, too.
          Does it fit? python -m sapo_jax.preflight --config=configs/pod/qwen3_30b_a3b_v5p.py \
              --topology=v5p:4x4x8
Time      Not measured; by preflight at least 1.4 minutes an iteration, 2.4 on 64 chips.
Result    Not measured. Expected by preflight: 33% of a chip's memory, 58% on 64 chips; an update of
          1.28 times the model's FLOPs with an MFU of at most 69%, 79% on 64 chips.
          docs/preflight.md has the rest.
"""

from ml_collections import ConfigDict, config_dict

from configs.pod import qwen3_4b_v5e


def get_config() -> ConfigDict:
    c = qwen3_4b_v5e.get_config()
    c.unlock()
    c.name = "qwen3_30b_a3b_v5p"
    directory = config_dict.FieldReference("models/Qwen3-30B-A3B")
    c.init_from = directory
    c.model.preset = directory
    c.tokenizer.directory = directory
    c.sampler.max_new_tokens = 7168
    c.mesh.tensor = 1
    c.sampler.mesh.tensor = 0  # as the learner
    c.mesh.expert = 8  # fsdp takes the rest: 16 on 128 chips
    c.batch.prompts = 128
    c.batch.micro_batches = 4  # 1 row of 8192 tokens on a chip
    c.sampler.slots = 128  # all groups at once: 16 rows on a chip
    c.eval.prompts = 128
    return c.lock()
