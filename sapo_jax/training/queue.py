"""Experience that waits to be learnt from, and how a checkpoint holds it.

Batches are numbered by the iteration that learns from them. With config.staleness = k, iteration i
samples batch i + k, the first one batches 1 to 1 + k, and none is sampled behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, SingleDeviceSharding

from sapo_jax import learner
from sapo_jax.model import moe
from sapo_jax.parallel import sharding
from sapo_jax.training import carry
from sapo_jax.training.checks import require
from sapo_jax.training.settings import Settings
from sapo_jax.types import Batch, Images, Seen, TrainState

Abstract = jax.ShapeDtypeStruct
Steps = list[tuple[int, int]]  # iterations, and how many tokens their policies sampled
AGE_EDGES = np.arange(-0.5, carry.OLDEST + 1).tolist()


class Experience(NamedTuple):
    """A batch to learn from.

    Attributes:
      minibatches: for the engine.
      metrics: of each run, of its rollout.
      samples: of each run, rows for a person to read.
      steps: of each run, whose tokens are learnt from; None where no policy sampled them.
    """

    minibatches: tuple[Batch, ...]
    metrics: list[dict[str, float]]
    samples: list[list[dict]]
    steps: list[Steps | None]


def due(run: Settings, waiting: int, iteration: int) -> range:
    """The batches that an iteration samples, before which so many wait."""
    last = min(iteration + run.config.staleness, run.config.iterations)
    return range(iteration + waiting, last + 1)


def ages(steps: Steps | None, iteration: int) -> dict[str, Any]:
    """Metrics of how much older than an iteration's first policy those are that sampled."""
    if steps is None:
        return {}
    pairs = [(iteration - step, count) for step, count in steps]
    age, counts = np.array(pairs or [(0, 0)]).T
    tokens = counts.sum() or math.nan
    per_bin, _ = np.histogram(np.minimum(age, carry.OLDEST), AGE_EDGES, weights=counts)
    return {
        "policy/age_mean": float(age @ counts / tokens),
        "policy/stale": float(counts[age > 0].sum() / tokens),
        "histogram/age": {"edges": AGE_EDGES, "counts": per_bin.astype(float).tolist()},
    }


def pack(state: TrainState, waiting: Sequence[Experience], begun: Any = None) -> Any:
    """The arrays of a checkpoint: the state, in ``queue`` the minibatches that wait, and in
    ``begun`` the completions that go on.
    """
    queue = [[_present(batch) for batch in one.minibatches] for one in waiting]
    more = ({"queue": queue} if queue else {}) | ({"begun": _present(begun)} if begun else {})
    return vars(state) | more if more else state


def unpack(saved: Any, metas: Sequence[Mapping[str, Any]]) -> tuple[TrainState, tuple, Any]:
    """What `pack` was given, from its result and the `meta` of each run; ``begun`` as a dict."""
    saved = dict(vars(saved)) if isinstance(saved, TrainState) else dict(saved)
    batches = [tuple(Batch(**batch) for batch in one) for one in saved.pop("queue", [])]
    begun = saved.pop("begun", None)
    waiting = []
    for i, minibatches in enumerate(batches):
        own = [meta["queue"][i] for meta in metas]
        metrics = [{k: math.nan if v is None else v for k, v in x["metrics"].items()} for x in own]
        rest = ([x[name] for x in own] for name in ("samples", "steps"))
        waiting.append(Experience(minibatches, metrics, *rest))
    return TrainState(**saved), tuple(waiting), begun


def meta(waiting: Sequence[Experience], run: int) -> list[dict[str, Any]]:
    """What JSON holds of the batches that wait, of one of their runs."""

    def plain(values):  # JSON has no NaN
        lost = {k: None for k, x in values.items() if isinstance(x, float) and math.isnan(x)}
        return values | lost

    return [
        {
            "metrics": plain(one.metrics[run]),
            "samples": list(map(plain, one.samples[run])),
            "steps": [list(pair) for pair in one.steps[run]],
        }
        for one in waiting
    ]


def abstract(run: Settings, iteration: int, state: TrainState, stored: Sequence[int]) -> Any:
    """The abstract values of `pack` behind an iteration.

    Args:
      run: one of the runs, all of which have the same shapes.
      iteration: finished ones.
      state: its abstract values.
      stored: how many batches wait in the checkpoint, of each run.

    Raises:
      ValueError: more or fewer than the run needs.
    """
    k = run.config.staleness
    wanted = min(k, run.config.iterations - iteration)
    for found in stored:
        text = f"what the run was saved with: behind iteration {iteration} its checkpoint has "
        text += f"{found} batches that wait, and {wanted} are needed"
        require(found == wanted, "staleness", k, text)
    batch, begun = abstract_batch(run, scored=True), None
    if run.config.sampler.budget:
        begun = placed(carry.abstract(run), run.sampler_mesh, sharding.spec("rows"))
    one = Experience((batch,) * run.config.batch.minibatches, [], [], [])
    return pack(state, [one] * wanted, begun)


def _present(tree: Any) -> dict[str, Any]:
    return {name: x for name, x in vars(tree).items() if x is not None}


def abstract_batch(run: Settings, *, scored: bool) -> Batch:
    """A minibatch, as it is scored or as an update takes it."""
    rows = run.rows // run.config.batch.minibatches
    s, shape = run.width + run.max_new_tokens, run.model
    floats = Abstract((rows, s), jnp.float32)
    integers = Abstract((rows, s), jnp.int32)
    routing, learns = None, scored and not run.supervised
    if shape.num_experts:
        choice = (len(shape.sparse_layers), shape.num_experts_per_tok)
        routing = Abstract((rows, s, *choice), moe.id_dtype(shape))
    batch = Batch(
        tokens=integers,
        mask=Abstract((rows, s), jnp.bool),
        segments=integers,
        sampler_logp=floats,
        old_logp=floats,
        advantages=Abstract((rows,), jnp.float32),
        ref_logp=floats if scored and run.needs_reference else None,
        weights=floats if scored and run.bounds else None,
        routing=routing,
        prompt_tokens=Abstract((rows, 2), jnp.float32) if learns else None,
        images=abstract_images(run, run.config.batch.prompts // run.config.batch.minibatches),
    )
    if run.packing is not None:
        lengths = np.zeros((2, rows), int)
        layout = jax.eval_shape(lambda: learner.plan(*lengths, s, run.packing))
        batch = jax.eval_shape(learner.pack, batch, layout)
    return placed(batch, run.mesh, sharding.spec("rows"))


def abstract_images(run: Settings, prompts: int, *, patches: bool | None = None) -> Any:
    """Images of prompts as patches, or as the tower's features, by what updates need."""
    room, shape = run.images, run.model
    if room is None:
        return None
    grids = Abstract((prompts, room.count, 3), jnp.int32)
    if shape.train_vision or run.supervised if patches is None else patches:
        size = prompts, room.tokens * shape.vision.merged, shape.vision.patch_dim
        return Images(Abstract(size, jnp.float32), grids)
    levels = 1 + len(shape.vision.deepstack_visual_indexes)
    size = prompts, levels, room.tokens, shape.hidden_size
    return Seen(Abstract(size, jnp.dtype(shape.compute_dtype)), grids)


def placed(tree: Any, mesh: Any, specs: Any) -> Any:
    """Abstract values that lie on a mesh as a tree of specs, or one for all, says.

    Without a mesh they lie on the first device, as `startup` places a run's state.
    """
    if mesh is None:
        place = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: Abstract(x.shape, x.dtype, sharding=place), tree)
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.tree.map(
        lambda x, s: Abstract(x.shape, x.dtype, sharding=sharding.named(mesh, s)),
        tree, specs,
    )  # fmt: skip
