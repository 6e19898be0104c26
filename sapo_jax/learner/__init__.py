"""Updates: `update(state, batch, hp)` is one optimizer step, one program for all traced values.

`learn` makes an iteration's updates, `score` gives log π of a batch by the same programs, `init`
the state before the first iteration.
"""

from sapo_jax.learner.optimizer import (
    SCHEDULES,
    Hyperparameters,
    abstract,
    init,
    learning_rate,
    optimizer,
    specs,
)
from sapo_jax.learner.step import (
    end_iteration,
    finish_iteration,
    forward,
    gradient,
    learn,
    record,
    score,
    score_routing,
    update,
)

__all__ = [
    "SCHEDULES", "Hyperparameters", "abstract", "end_iteration", "finish_iteration", "forward",
    "gradient", "init", "learn", "learning_rate", "optimizer", "record", "score", "score_routing",
    "specs", "update",
]  # fmt: skip
