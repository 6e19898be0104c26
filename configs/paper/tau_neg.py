"""The paper's ablation of temperatures (section 5.1, Figure 5): τ_neg around τ_pos = 1.

Claim     The paper's: τ_neg = 0.95 collapses from about 870 gradient steps on, 1.0 from about 1420,
          1.05 goes on to 1800 (one run each; 1.0 learns fastest until then).
Command   Each run alone, as configs/paper/controlled.py, whose setting it is:
          python -m sapo_jax.main --config=configs/paper/tau_neg.py --workdir=gs://.../1.05
          ... --config.objective.tau_neg=1.0 and ... --config.objective.tau_neg=0.95
          As one sweep: sapo-jax sweep --config=paper/tau_neg, once a sweep can give each run
          several chips.
Time      Not measured.
Result    Not measured.
"""

from ml_collections import ConfigDict

from configs.paper import controlled
from sapo_jax.axes import axis


def get_config() -> ConfigDict:
    c = controlled.get_config()
    c.name = "paper_tau_neg"  # ours
    c.objective.tau_pos = 1.0  # paper
    c.objective.tau_neg = 1.05  # paper
    return c


def get_sweep() -> list[dict]:
    return axis("objective.tau_neg", 1.05, 1.0, 0.95)
