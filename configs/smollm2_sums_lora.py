"""LoRA on a real model: adapters of SmolLM2-135M-Instruct learn what configs/smollm2_sums.py does.

Claim     None yet: adapters of rank 16 on every projection, 3.6% as many numbers as the model has.
Command   make smollm2
          .venv/bin/python -m sapo_jax.main --config=configs/smollm2_sums_lora.py \
              --workdir=runs/smollm2_sums_lora
Time      Not measured.
Result    Not measured.
"""

from ml_collections import ConfigDict

from configs import smollm2_sums


def get_config() -> ConfigDict:
    c = smollm2_sums.get_config()
    c.unlock()
    c.name = "smollm2_sums_lora"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.learner.learning_rate = 1e-4  # ten times that of all parameters, a rule of thumb
    return c.lock()
