"""The named pytrees that flow between the stations of a run, and the reductions that they log.

Dimension key: P prompts, G completions per prompt, B = P·G rows (the rows of one prompt are
adjacent), S row length, N prompt length. Rows are left-aligned and gap-free: prompt [0, p),
completion [p, p+n), pads after. Learner arrays are aligned with ``tokens``: entry s belongs to
token s given the tokens before it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

STOP, LENGTH, GOES_ON = 0, 1, 2  # values of Rollout.finished


@struct.dataclass
class Images:
    """Images as patches, one image after the other, in the order of their placeholders.

    Those of each of P prompts, where both arrays have a leading axis P.
    """

    patches: jax.Array  # f32[N, channels·frames·height·width], blocks of m×m adjacent; then pads
    grids: jax.Array  # i32[I, 3], patches of each in time (1), height and width; 0 at pads


@struct.dataclass
class Seen:
    """What the tower of a model made of the images of P prompts."""

    features: jax.Array  # f[P, 1 + J, T, D], see `model.vision.features`
    grids: jax.Array  # i32[P, I, 3], as those of `Images`


@struct.dataclass
class Prompts:
    """Tokenised prompts, as the sampler takes them."""

    tokens: jax.Array  # i32[P, N], left-aligned
    length: jax.Array  # i32[P]
    id: jax.Array  # u32[P], the same for the same prompt in every run
    task: jax.Array  # i32[P], index into the run's tasks
    occurrence: jax.Array | None = None  # i32[P], prompts of the same id before it; of the sampler
    iteration: jax.Array | None = None  # i32[P], which drew it, where completions go on
    images: Images | Seen | None = None  # of all prompts, or of each


@struct.dataclass
class Rollout:
    """Sampled completions of a batch of prompts."""

    tokens: jax.Array  # i32[B, S]
    mask: jax.Array  # bool[B, S], completion tokens through the stop token
    sampler_logp: jax.Array  # f32[B, S], nats
    prompt_id: jax.Array  # u32[B]
    sample_index: jax.Array  # i32[B], 0..G-1 within the prompt
    policy_step: jax.Array  # i32[B], the iteration whose policy sampled the row, or its first token
    finished: jax.Array  # i32[B], STOP or LENGTH; GOES_ON where it has not ended
    segments: jax.Array  # i32[B, S], 1 on prompt and completion, 0 on pads
    routing: jax.Array | None = None  # MoE only: i8/i16[B, S, L_moe, k], see `model.routing`
    token_step: jax.Array | None = None  # i32[B, S], policy_step of each token, where rows go on
    images: Images | Seen | None = None  # of the P prompts


@struct.dataclass
class Batch:
    """What the learner takes: rows of a rollout with their advantages."""

    tokens: jax.Array  # i32[B, S]
    mask: jax.Array  # bool[B, S]
    segments: jax.Array  # i32[B, S]
    sampler_logp: jax.Array  # f32[B, S]
    old_logp: jax.Array  # f32[B, S]
    advantages: jax.Array  # f32[B], or f32[B, S] where rows are packed
    ref_logp: jax.Array | None = None  # f32[B, S]
    weights: jax.Array | None = None  # f32[B, S], multiply the surrogate, never a denominator
    routing: jax.Array | None = None  # MoE only: i8/i16[B, S, L_moe, k], what was recorded
    prefix: jax.Array | None = None  # i32[B, S], segment that a token's own continues; 0: none
    count: jax.Array | None = None  # i32[parts], micro-batches in use; None: all
    # f32[B, 2] or f32[B, S, 2], tokens with A ≠ 0 of the row's prompt, and those of them whose A
    # has the row's sign; None: every sequence is a prompt of its own
    prompt_tokens: jax.Array | None = None
    images: Images | Seen | None = None  # of the P prompts; patches where the tower is learnt
    # i32[B, S], whose images a token sees; None: the rows of each of the P are adjacent
    prompt: jax.Array | None = None

    @property
    def token_advantages(self) -> jax.Array:
        """The advantage of each token."""
        own = self.advantages if self.advantages.ndim == 2 else self.advantages[:, None]
        return jnp.broadcast_to(own, self.tokens.shape)


@struct.dataclass
class Frozen:
    """Parameters that no update changes; the runs of a population share them."""

    params: Any


@struct.dataclass
class TrainState:
    """What updates change of all that the next update depends on."""

    iteration: jax.Array  # i32[], finished iterations
    update: jax.Array  # i32[], finished optimizer steps
    params: Any  # what is trained: all parameters, or adapters beside those of a `Frozen`
    opt_state: Any


@struct.dataclass
class Weighted:
    """A mean that is not divided yet: merging adds both parts."""

    numerator: jax.Array
    denominator: jax.Array

    def merge(self, axis: int = 0) -> Weighted:
        """Sum over a stacked axis (micro-batches, minibatches, shards)."""
        return Weighted(jnp.sum(self.numerator, axis), jnp.sum(self.denominator, axis))


@struct.dataclass
class Effective:
    """The effective share of a sample with weights v, (Σv)²/(n·Σv²); merging adds the sums."""

    total: jax.Array
    square: jax.Array
    count: jax.Array

    def merge(self, axis: int = 0) -> Effective:
        """Sum over a stacked axis."""
        return Effective(*(jnp.sum(x, axis) for x in (self.total, self.square, self.count)))


@struct.dataclass
class Max:
    """A maximum; merging takes the larger."""

    value: jax.Array

    def merge(self, axis: int = 0) -> Max:
        """Maximum over a stacked axis."""
        return Max(jnp.max(self.value, axis))


@struct.dataclass
class Min:
    """A minimum; merging takes the smaller."""

    value: jax.Array

    def merge(self, axis: int = 0) -> Min:
        """Minimum over a stacked axis."""
        return Min(jnp.min(self.value, axis))


@struct.dataclass
class Histogram:
    """Counts between fixed edges; merging adds the counts."""

    counts: jax.Array  # f32[bins]
    edges: jax.Array  # f32[bins + 1]

    def merge(self, axis: int = 0) -> Histogram:
        """Sum of the counts over a stacked axis; the edges are the same throughout."""
        return Histogram(jnp.sum(self.counts, axis), jnp.take(self.edges, 0, axis))


REDUCTIONS = (Weighted, Effective, Max, Min, Histogram)


def is_reduction(x: Any) -> bool:
    """True for the mergeable reductions; the ``is_leaf`` of trees of metrics."""
    return isinstance(x, REDUCTIONS)


def add(first: Any, second: Any) -> Any:
    """The sum of two trees of arrays and mergeable reductions."""

    def each(a, b):
        both = jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
        return both.merge() if is_reduction(a) else a + b

    return jax.tree.map(each, first, second, is_leaf=is_reduction)


def zero(shapes: Any) -> Any:
    """What changes nothing as the second argument of `add`, for a tree of such shapes."""

    def each(x):
        fill = {Max: -jnp.inf, Min: jnp.inf}.get(type(x), 0)
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, fill, leaf.dtype), x)

    return jax.tree.map(each, shapes, is_leaf=is_reduction)


def merge(stacked: Any, axis: int = 0) -> Any:
    """Merge a tree of stacked reductions over ``axis``."""
    return jax.tree.map(lambda r: r.merge(axis), stacked, is_leaf=is_reduction)
