"""SAPO on Qwen3-8B, for 16 chips of TPU v6e: mathematics with checked answers, 8192 tokens a row.

Claim     None yet: this is the starting point of an ablation, with the paper's 4 minibatches a
          rollout. Another objective: --config.objective.name=grpo (or gspo, cispo, ...).
Command   On every host of a v6e 4x4 slice (docs/pods.md), with Qwen/Qwen3-8B in models/Qwen3-8B
          and JSON lines with "problem" and "answer" in data/math:
          python -m sapo_jax.main --config=configs/pod/qwen3_8b_v6e.py --workdir=gs://...
          Does it fit? python -m sapo_jax.preflight --config=configs/pod/qwen3_8b_v6e.py \
              --topology=v6e:4x4
Time      Not measured; by preflight at least 7 minutes an iteration.
Result    Not measured. Expected by preflight: 85% of a chip's memory, an update of 1.24 times the
          model's FLOPs with an MFU of at most 54%. docs/preflight.md has the rest.
"""

from ml_collections import ConfigDict, config_dict

from configs.pod import qwen3_4b_v5e


def get_config() -> ConfigDict:
    c = qwen3_4b_v5e.get_config()
    c.unlock()
    c.name = "qwen3_8b_v6e"
    directory = config_dict.FieldReference("models/Qwen3-8B")
    c.init_from = directory
    c.model.preset = directory
    c.tokenizer.directory = directory
    c.sampler.max_new_tokens = 7168
    c.mesh.tensor = 4  # fsdp takes the rest: 4 on 16 chips
    c.batch.micro_batches = 64  # 1 row of 8192 tokens on a chip
    c.sampler.slots = 16  # groups in flight: 128 rows on 8 chips
    return c.lock()
