"""How one token is drawn: counter-based noise, Gumbel-max, and truncation for evaluation.

The noise of a token is a function of (seed, domain, iteration, prompt id, sample index, completion
index) alone, and of how often the prompt stands before in the batch; so it is bitwise the same
whatever the batch layout, the number of slots, or where a run was restarted.
"""

from __future__ import annotations

import collections
import itertools
import zlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.model import vocab
from sapo_jax.parallel import collectives
from sapo_jax.types import Prompts

BLOCK = 256  # vocabulary entries per block of the two-stage draw
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry, in bits


class Controls(NamedTuple):
    """Traced settings of a draw; see `controls`."""

    temperature: jax.Array  # f32[], > 0
    noise: jax.Array  # f32[], 1 to sample, 0 for greedy
    top_k: jax.Array  # i32[], V or more switches it off
    top_p: jax.Array  # f32[], 1 switches it off


def controls(
    temperature: float | Sequence[float], top_k: int | None = None, top_p: float | None = None
) -> Controls:
    """Settings of a draw; temperature 0 is greedy, its log-probabilities are those at 1.

    Of several runs, with a leading axis, by their temperatures.

    Raises:
      ValueError: one that draws from no distribution.
    """
    if np.ndim(temperature):
        each = [controls(own, top_k, top_p) for own in temperature]
        return Controls(*map(np.stack, zip(*each, strict=True)))
    if not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy), or from 1e-6 to 1e6")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None for all tokens")
    greedy = temperature == 0
    return Controls(
        jnp.float32(1 if greedy else temperature),
        jnp.float32(0 if greedy else 1),
        jnp.int32(2**31 - 1 if top_k is None else min(top_k, 2**31 - 1)),
        jnp.float32(1 if top_p is None else top_p),
    )


@partial(jax.jit, static_argnames="domain")
def base_key(seed: jax.Array, domain: str, iteration: jax.Array | None = None) -> jax.Array:
    """The key of one rollout, or of those of several runs, by their seeds.

    Without an iteration, of what `row_keys` is given those of.
    """
    if seed.ndim:
        return jax.vmap(lambda own: base_key(own, domain, iteration))(seed)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(domain.encode()))
    return key if iteration is None else jax.random.fold_in(key, iteration)


def with_occurrence(prompts: Prompts, runs: int = 1) -> Prompts:
    """The prompts, on the host, each with the number of those of its id before it, in its run."""
    if prompts.occurrence is not None:
        return prompts
    occurrence_P: list[int] = []
    for own in np.asarray(prompts.id).reshape(runs, -1).tolist():
        before = collections.defaultdict(itertools.count)
        occurrence_P += [next(before[prompt_id]) for prompt_id in own]
    return prompts.replace(occurrence=np.array(occurrence_P, np.int32))


def _threefry2x32(key_X2: jax.Array, high_X: jax.Array, low_X: jax.Array) -> list[jax.Array]:
    """Threefry-2×32 with 20 rounds (Salmon et al. 2011) of counters; twice u32[...].

    As `jax.random` computes it, whose rounds are a loop on CPU: each use of that one takes half a
    second to compile.
    """
    one, two = key_X2[..., 0], key_X2[..., 1]
    keys = (one, two, one ^ two ^ np.uint32(0x1BD11BDA))
    x, y = high_X + keys[0], low_X + keys[1]
    for i in range(5):
        for by in ROTATIONS[i % 2]:
            x = x + y
            y = x ^ ((y << by) | (y >> (32 - by)))
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return [x, y]


def _fold_in(key_X2: jax.Array, data_X: jax.Array) -> jax.Array:
    """`jax.random.fold_in` of the words of keys, u32[..., 2]."""
    data_X = data_X.astype(jnp.uint32)
    return jnp.stack(_threefry2x32(key_X2, jnp.zeros_like(data_X), data_X), -1)


def row_keys(
    base: jax.Array,
    prompt_id_P: jax.Array,
    group_size: int,
    occurrence_P: jax.Array | None = None,
    iteration_P: jax.Array | None = None,
) -> jax.Array:
    """One key for each completion, key[P, G]; iterations are in the base, where none are given."""
    words_2 = jax.random.key_data(base)
    if iteration_P is not None:
        words_2 = _fold_in(words_2, iteration_P)
    keys_P2 = _fold_in(words_2, prompt_id_P)
    if occurrence_P is not None:
        no_sample_P = -occurrence_P.astype(jnp.uint32)  # the index of none
        again_P2 = _fold_in(keys_P2, no_sample_P)
        keys_P2 = jnp.where(occurrence_P[:, None] > 0, again_P2, keys_P2)
    keys_PG2 = _fold_in(keys_P2[:, None], jnp.arange(group_size)[None])
    return jax.random.wrap_key_data(keys_PG2, impl="threefry2x32")


def _gumbel(key_X2: jax.Array, at_X: jax.Array) -> jax.Array:
    """The numbers at some places of `jax.random.gumbel` of the words of keys, f32[...]."""
    x, y = _threefry2x32(key_X2, jnp.zeros_like(at_X), at_X)
    mantissa = ((x ^ y) >> 9) | np.float32(1).view(np.uint32)
    tiny = np.finfo(np.float32).tiny
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(tiny, uniform * (1 - tiny) + tiny)))


def _two_gumbels(key_2: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """Noise of the blocks and inside one, of the two keys that `jax.random.split` makes.

    By one hash, which is most of what a decode program takes to compile.
    """
    keys_22 = _fold_in(key_2, jnp.arange(2))
    index = jnp.arange(blocks + BLOCK, dtype=jnp.uint32)
    outer = index < blocks
    key_X2 = jnp.where(outer[:, None], keys_22[0], keys_22[1])
    noise = _gumbel(key_X2, jnp.where(outer, index, index - blocks))
    return noise[:blocks], noise[blocks:]


def _truncate(logits_V: jax.Array, c: Controls) -> jax.Array:
    """−inf outside the top_k largest and outside the smallest set of probability ≥ top_p.

    The likeliest token always stays, even if a tiny top_p is 0 on the device.
    """
    sorted_V = jnp.sort(logits_V)[::-1]
    before_V = jnp.cumsum(jax.nn.softmax(sorted_V)) - jax.nn.softmax(sorted_V)
    rank_V = jnp.arange(sorted_V.size)
    kept_V = (rank_V < c.top_k) & (before_V < c.top_p) | (rank_V == 0)
    threshold = jnp.min(jnp.where(kept_V, sorted_V, jnp.inf))
    return jnp.where(logits_V >= threshold, logits_V, -jnp.inf)


def _gumbel_max(key_2: jax.Array, logits_V: jax.Array, noise: jax.Array) -> jax.Array:
    """A draw from softmax(logits), in two stages where V is large.

    A block is drawn by its log-sum-exp, then a token inside it: exact, and noise is needed for
    V/BLOCK + BLOCK numbers instead of V. Greedy (noise 0) takes the argmax over all of V.
    """
    size = logits_V.size
    if size <= BLOCK:
        numbers_V = _gumbel(key_2, jnp.arange(size, dtype=jnp.uint32))
        return jnp.argmax(logits_V + noise * numbers_V)
    padded = jnp.pad(logits_V, (0, -size % BLOCK), constant_values=-jnp.inf)
    blocks_NB = padded.reshape(-1, BLOCK)
    outer_N, inner_B = _two_gumbels(key_2, len(blocks_NB))
    block = jnp.argmax(jax.nn.logsumexp(blocks_NB, axis=-1) + outer_N)
    inside = jnp.argmax(blocks_NB[block] + inner_B)
    return jnp.where(noise > 0, block * BLOCK + inside, jnp.argmax(logits_V))


def _gumbel_max_split(key_2: jax.Array, logits_V: jax.Array, noise: jax.Array) -> jax.Array:
    """`_gumbel_max` over a vocabulary of which each device has a part.

    The blocks are those of the whole vocabulary, and so is their noise; a block may lie on two
    devices. What travels is the mass of each block, and one block.
    """
    part = logits_V.size
    start = vocab.offset(part)
    count = -(-part * collectives.axis_size("tensor") // BLOCK)
    own = part // BLOCK + 2  # blocks that a part can touch
    padded = jax.lax.dynamic_update_slice(
        jnp.full(own * BLOCK, -jnp.inf), logits_V, (start % BLOCK,)
    )
    blocks_NB = padded.reshape(own, BLOCK)
    outer_N, inner_B = _two_gumbels(key_2, count)
    mass_N = jax.lax.dynamic_update_slice(
        jnp.full(count + own, -jnp.inf), jax.nn.logsumexp(blocks_NB, axis=-1), (start // BLOCK,)
    )[:count]
    most_N = collectives.pmax(mass_N, vocab.TENSOR)
    mass_N = most_N + jnp.log(collectives.psum(jnp.exp(mass_N - most_N), vocab.TENSOR))
    block = jnp.argmax(mass_N + outer_N)
    at = block - start // BLOCK
    mine_B = blocks_NB[jnp.clip(at, 0, own - 1)]
    mine_B = jnp.where((at >= 0) & (at < own), mine_B, -jnp.inf)
    block_B = collectives.pmax(mine_B, vocab.TENSOR)
    inside = jnp.argmax(block_B + inner_B)
    return jnp.where(noise > 0, block * BLOCK + inside, vocab.argmax(logits_V))


def draw(
    row_key: jax.Array, index: jax.Array, logits_V: jax.Array, c: Controls, *, truncate: bool
) -> tuple[jax.Array, jax.Array]:
    """Draw the token at a completion index of one row.

    Args:
      row_key: from `row_keys`.
      index: i32[], 0 for a completion's first token.
      logits_V: f32[V], or this device's part of the vocabulary (see `model.vocab`).
      c: the settings.
      truncate: whether top_k and top_p apply (static: sorting V costs).

    Returns:
      (token i32[], its log-probability f32[] in nats under the whole softmax(logits/temperature)).
    """
    logits_V = logits_V / c.temperature
    key_2 = _fold_in(jax.random.key_data(row_key), index)
    devices = collectives.axis_size("tensor")
    if truncate or devices == 1 or logits_V.size * devices <= BLOCK:
        whole_V = vocab.all_gather(logits_V)
        token = _gumbel_max(key_2, _truncate(whole_V, c) if truncate else whole_V, c.noise)
    else:
        token = _gumbel_max_split(key_2, logits_V, c.noise)
    token = token.astype(jnp.int32)
    return token, vocab.pick(vocab.log_softmax(logits_V), token)
