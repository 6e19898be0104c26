"""The paper's ablation of temperatures (section 5.1, Figure 5): τ_neg around τ_pos = 1.

Claim     The paper's: τ_neg = 0.95 collapses from about 870 gradient steps on, 1.0 from about 1420,
          1.05 goes on to 1800 (one run each; 1.0 learns fastest until then).
Command   As configs/paper/controlled.py, whose setting it is:
          python -m sapo_jax.sweep --config=configs/paper/tau_neg.py --workdir=gs://.../fig5
          trains the three runs one after the other, each on the whole slice; with
          --config.mesh.run=2 two at a time, each on half of it.
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
