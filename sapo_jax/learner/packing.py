"""Rows without pads: several sequences in a row, and a prompt once for completions that share it.

The host decides where each token goes (`plan`), the device moves them (`pack`, `unpack`). Shapes
are static and have room for the longest completions; the number of micro-batches that are in use is
data, and the others cost nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax.learner import images
from sapo_jax.parallel import sharding
from sapo_jax.types import Batch

LENGTH = 1024  # tokens of a packed row, unless one sequence has more
# Tokens of a micro-batch on a device: fewer would not keep it busy, more would make room for
# completions that are longer than most are. At least MICRO_ROWS whole rows (measured on CPUs).
MICRO_TOKENS, MANY_TOKENS, MICRO_ROWS = {"cpu": 2048}, 16384, 5


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a packed minibatch: [parts · micro_batches · rows, length].

    Attributes:
      group_size: completions that share a prompt; 1: every sequence has its own copy.
      length: tokens of a row.
      segment: most tokens of a segment: a completion, or one with its prompt.
      rows: of a micro-batch, on one part of the rows.
      micro_batches: most that any lengths need.
      parts: of the rows, see `sharding.parts`.
    """

    group_size: int
    length: int
    segment: int
    rows: int
    micro_batches: int
    parts: int = 1


class Layout(NamedTuple):
    """Where the tokens of a minibatch's rows [B, S] stand in packed rows [R, L]."""

    token: np.ndarray  # i32[R, L], index into the B·S tokens, −1 at pads
    segments: np.ndarray  # i32[R, L], see `model.segments`
    prefix: np.ndarray | None  # i32[R, L], None where nothing is shared
    place: np.ndarray  # i32[B, S], index into the R·L tokens, −1 where a token is left out
    count: np.ndarray  # i32[parts], micro-batches in use, the same number for all parts


def micro_tokens(platform: str, width: int) -> int:
    """Tokens of a micro-batch on one device for sequences of at most ``width``."""
    return max(MICRO_TOKENS.get(platform, MANY_TOKENS), MICRO_ROWS * width)


def together(prompt: int, completion: int, group_size: int, budget: int) -> int:
    """Completions of the longest kind that have room behind one prompt."""
    return min(group_size, max(1, (min(LENGTH, budget) - prompt) // completion))


def sharing_pays(prompt: int, completion: int, group_size: int, budget: int) -> bool:
    """Whether shared prompts save a tenth of the tokens of the longest sequences.

    Below that, what attention to a prompt elsewhere costs is more.
    """
    copies = 1 - 1 / together(prompt, completion, group_size, budget)
    return copies * prompt >= 0.1 * (prompt + completion)


def make_shape(
    rows: int, prompt: int, completion: int, *, group_size: int, budget: int, parts: int = 1
) -> Shape:
    """The shape for minibatches of ``rows`` sequences, whatever their lengths turn out to be.

    Args:
      rows: B, whole groups.
      prompt, completion: most tokens of each, N and T.
      group_size: completions that share a prompt, 1 for none.
      budget: tokens of a micro-batch on one part; at least one sequence is put there.
      parts: of the rows.
    """
    if group_size > 1:
        segment = completion
        count = together(prompt, completion, group_size, budget)
        length = prompt + count * completion
        needed = rows // group_size * -(-group_size // count)
    else:
        segment = prompt + completion
        count = min(rows, max(1, min(LENGTH, budget) // segment))
        length = count * segment
        needed = -(-rows // count)
    own = -(-needed // parts)
    micro_batches = -(-own // max(1, budget // length))
    return Shape(group_size, length, segment, -(-own // micro_batches), micro_batches, parts)


def _fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Indices of the sizes in bins: each in the fullest one that has room, the largest first."""
    bins, room = [], []  # room: (tokens left, bin), ascending
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(room, (sizes[i], -1))
        left, n = room.pop(at) if at < len(room) else (capacity, len(bins))
        if n == len(bins):
            bins.append([])
        bins[n].append(i)
        bisect.insort(room, (left - sizes[i], n))
    return bins


def _units(prompt_B: np.ndarray, completion_B: np.ndarray, shape: Shape) -> list[list[int]]:
    """Rows of the minibatch that stand together behind one prompt; those without tokens nowhere."""
    units, g = [], shape.group_size
    for start in range(0, len(prompt_B), g):
        own = [i for i in range(start, start + g) if prompt_B[i] + completion_B[i]]
        if own:
            sizes = [int(completion_B[i]) for i in own]
            bins = _fit(sizes, shape.length - int(prompt_B[own[0]]))
            units += [[own[i] for i in sorted(found)] for found in bins]
    return units


def plan(prompt_B: np.ndarray, completion_B: np.ndarray, width: int, shape: Shape) -> Layout:
    """Where each token goes; the same for the same lengths.

    Args:
      prompt_B, completion_B: tokens of each row, the prompt first; 0 and 0 leave a row out. With a
        group size above 1, the rows of a group are adjacent and have the same prompt.
      width: S, tokens of a row as it is now.
      shape: from `make_shape`, for as many rows and tokens.
    """
    units = _units(prompt_B, completion_B, shape)
    sizes = [int(prompt_B[u[0]] + completion_B[u].sum()) for u in units]
    bins = _fit(sizes, shape.length)
    bins.sort(key=lambda found: -sum(sizes[i] for i in found))
    count = max(1, -(-len(bins) // (shape.rows * shape.parts)))
    full = (shape.parts, shape.micro_batches, shape.rows, shape.length)
    token, segments, prefix = (np.full(full, fill, np.int32) for fill in (-1, 0, 0))
    place = np.full((len(prompt_B), width), -1, np.int32)
    for n, found in enumerate(bins):  # dealt, so that all parts and micro-batches have as much
        row, at = divmod(n, count * shape.parts)
        where = at % shape.parts, at // shape.parts, row
        first = int(np.ravel_multi_index((*where, 0), full))
        _fill([units[i] for i in found], prompt_B, completion_B, first, place,
              *(x[where] for x in (token, segments, prefix)))  # fmt: skip
    flat = [x.reshape(-1, shape.length) for x in (token, segments, prefix)]
    flat[2] = flat[2] if shape.group_size > 1 else None
    return Layout(*flat, place, np.full(shape.parts, count, np.int32))


def _fill(units, prompt_B, completion_B, first, place, token_L, segments_L, prefix_L) -> None:
    """Write one packed row, which begins at ``first`` of all tokens."""
    width, at, segment = place.shape[1], 0, 0

    def put(row: int, start: int, stop: int, prefix: int) -> None:
        nonlocal at
        end = at + stop - start
        token_L[at:end] = row * width + np.arange(start, stop)
        segments_L[at:end], prefix_L[at:end] = segment, prefix
        place[row, start:stop] = first + np.arange(at, end)
        at = end

    for rows in units:
        p, segment, prompt = int(prompt_B[rows[0]]), segment + 1, at
        prefix = segment if len(rows) > 1 and p else 0
        put(rows[0], 0, p, 0)
        for row in rows:
            place[row, :p] = first + np.arange(prompt, prompt + p)
            segment += bool(prefix)
            put(row, p, p + int(completion_B[row]), prefix)


@partial(jax.jit, static_argnames="mesh")
def pack(batch: Batch, layout: Layout, mesh: Mesh | None = None) -> Batch:
    """The rows [B, S] as packed rows; their advantages become those of tokens."""
    batch = images.with_prompt(batch)
    width = batch.tokens.shape[1]

    def take(x, fill=0):
        own = x.reshape(-1, *x.shape[2:])[jnp.maximum(layout.token, 0)]
        present = (layout.token >= 0).reshape(*layout.token.shape, *(1 for _ in x.shape[2:]))
        return jnp.where(present, own, jnp.asarray(fill, x.dtype))

    per_token = {
        name: take(x)
        for name in ("tokens", "mask", "sampler_logp", "old_logp", "ref_logp", "weights", "prompt")
        if (x := getattr(batch, name)) is not None
    }
    if batch.routing is not None:
        per_token["routing"] = take(batch.routing, -1)
    for name in ("advantages", "prompt_tokens"):
        if (x := getattr(batch, name)) is not None:
            own, present = x[layout.token // width], layout.token >= 0
            per_token[name] = jnp.where(present if own.ndim == 2 else present[..., None], own, 0)
    packed = batch.replace(
        **per_token,
        segments=jnp.asarray(layout.segments),
        prefix=None if layout.prefix is None else jnp.asarray(layout.prefix),
        count=jnp.asarray(layout.count),
    )
    return sharding.constrain(packed, mesh, sharding.spec("rows"))


@partial(jax.jit, static_argnames="mesh")
def unpack(packed: Any, layout: Layout, mesh: Mesh | None = None) -> Any:
    """What was computed for packed rows, at the tokens' places in the rows [B, S]; 0 elsewhere.

    Integers are experts, which are −1 there: none.
    """

    def take(x):
        own = x.reshape(-1, *x.shape[2:])[jnp.maximum(layout.place, 0)]
        present = (layout.place >= 0).reshape(*layout.place.shape, *(1 for _ in x.shape[2:]))
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        return jnp.where(present, own, jnp.asarray(fill, x.dtype))

    return sharding.constrain(jax.tree.map(take, packed), mesh, sharding.spec("rows"))
