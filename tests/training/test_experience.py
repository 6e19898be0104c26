"""What the log keeps of an iteration is what there is to learn from."""

import types

import numpy as np

from sapo_jax.tasks.base import make_example
from sapo_jax.training import experience


def logged(right_PG, count, elsewhere=()):
    """(problem, sample, right, of its group) of each row that is kept."""
    right_PG = np.array(right_PG, bool)
    examples = [make_example(f"{p}?", str(p), "") for p in range(len(right_PG))]
    texts = [None if p in elsewhere else f"{p}" for p, row in enumerate(right_PG) for _ in row]
    log, batch = types.SimpleNamespace(samples=count), types.SimpleNamespace(group_size=4)
    run = types.SimpleNamespace(config=types.SimpleNamespace(log=log, batch=batch))
    groups = types.SimpleNamespace(texts=lambda size: texts)
    query = types.SimpleNamespace(examples=examples, groups=groups)
    right_B = right_PG.ravel()
    columns = np.zeros_like(right_B), right_B, right_B.astype(float), right_B - 0.5
    rows = experience._samples(run, query, *columns, {"iteration": 3})
    assert all(row["group_size"] == 4 and row["reward"] == row["right"] for row in rows)
    return [(int(r["answer"]), r["sample_index"], r["right"], r["group_right"]) for r in rows]


def test_right_and_wrong_ones_of_mixed_groups_come_first():
    """The first two of each problem were kept: both right, say, where 2 of 4 were."""
    failed, late, mixed = [0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]
    groups = [failed, late, [1, 1, 1, 1], mixed]
    of_late, of_mixed = [(1, 0, True, 3), (1, 3, False, 3)], [(3, 0, False, 2), (3, 1, True, 2)]
    assert logged(groups, 4) == of_late + of_mixed
    of_failed = [(0, 0, False, 0), (0, 1, False, 0)]
    assert logged(groups, 6) == of_failed + of_late + of_mixed
    assert len(logged(groups, 32)) == 8  # as many lines as before
    assert logged(groups, 3) == [*of_late, of_mixed[0]]
    assert logged(groups, 2, elsewhere=(1,)) == of_mixed
