"""Updates: `update(state, batch, hp)` is one optimizer step, one program for all traced values.

`make_minibatches` makes of an iteration's judged rows what `learn` takes, one update after the
other; `score` gives log π of a batch by the same programs; `init` the state before the first
iteration.
"""

from sapo_jax.learner.minibatches import make_minibatches, select_rows, split_rows
from sapo_jax.learner.optimizer import (
    SCHEDULES,
    Hyperparameters,
    Static,
    abstract,
    init,
    learning_rate,
    optimizer,
    partition_specs,
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
    "SCHEDULES", "Hyperparameters", "Static", "abstract", "end_iteration", "finish_iteration",
    "forward", "gradient", "init", "learn", "learning_rate", "make_minibatches", "optimizer",
    "partition_specs", "record", "score", "score_routing", "select_rows", "split_rows", "update",
]  # fmt: skip
