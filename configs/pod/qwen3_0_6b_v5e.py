"""A τ sweep of Qwen3-0.6B on 16 chips of TPU v5e: four runs at a time, each on four chips.

Claim     None yet: what τ_neg does in mathematics with checked answers, over three seeds.
Command   On every host of a v5e 4x4 slice (docs/pods.md), with Qwen/Qwen3-0.6B in
          models/Qwen3-0.6B and JSON lines with "problem" and "answer" in data/math:
          python -m sapo_jax.sweep --config=configs/pod/qwen3_0_6b_v5e.py --workdir=gs://...
          Does it fit? python -m sapo_jax.preflight --config=configs/pod/qwen3_0_6b_v5e.py \
              --topology=v5e:4x4
Time      Not measured.
Result    Not measured. docs/preflight.md says what preflight expects.
"""

from ml_collections import ConfigDict, config_dict

from configs.pod import qwen3_4b_v5e
from sapo_jax.axes import axis, product


def get_config() -> ConfigDict:
    c = qwen3_4b_v5e.get_config()
    c.unlock()
    c.name = "qwen3_0_6b_v5e"
    directory = config_dict.FieldReference("models/Qwen3-0.6B")
    c.init_from = directory
    c.model.preset = directory
    c.tokenizer.directory = directory
    c.mesh.run = 4
    c.mesh.tensor = 1  # fsdp takes the rest: 4 on 16 chips
    c.sampler.mesh.tensor = 0  # as the learner
    c.batch.micro_batches = 32  # 2 rows of 4096 tokens on a chip
    c.sampler.slots = 4  # groups in flight of each run: 16 rows on a chip
    return c.lock()


def get_sweep() -> list[dict]:
    return product(axis("seed", 0, 1, 2), axis("objective.tau_neg", 0.95, 1.0, 1.05, 2.0))
