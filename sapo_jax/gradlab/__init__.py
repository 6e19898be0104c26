"""The gradient lab: gradients of many algorithms on the same rows, and what they point at.

    lab = gradlab.Lab(params, frozen, fresh, rewards, prompts, "group", hp)
    halves = lab.targets()                      # of the expected reward's gradient, and two others
    gradlab.compare(lab, halves, {"sapo": OBJECTIVES["sapo"], "gspo": OBJECTIVES["gspo"]})
    gradlab.compare_buckets(lab, halves, OBJECTIVES["sapo"], masks)
    gradlab.describe(algorithms, params, frozen, hp)

`compare` has norms, cosines, fidelities and what each gate removed; `compare_buckets` the same of
one algorithm by `buckets` of tokens; `describe` the tokens' coefficients. All of it is JSON.
`experiments/gradient_statistics` examines a run with them; `python -m sapo_jax.report` makes a page
of its results.
"""

from sapo_jax.gradlab.lab import UNGATED, Halves, Lab, compare, compare_buckets
from sapo_jax.gradlab.tokens import buckets, describe, score

__all__ = ["UNGATED", "Halves", "Lab", "buckets", "compare", "compare_buckets", "describe", "score"]
