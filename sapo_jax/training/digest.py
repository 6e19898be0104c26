"""What tells the arrays of a state from any others: a checksum of each, the same on every mesh."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
# A minibatch that waits or completions that go on, on the sampler's own devices; see `queue.pack`
WAITING = re.compile(r"(queue/\d+/\d+/|begun/)?(.*)")


class Digest(NamedTuple):
    """What is known of an array."""

    checksum: int
    finite: bool


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, such as ``params/layers/down``."""
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ of a hash of each element's bits and place, mod 2³²; and whether all are finite.

    A hash of one element is a bijection of its bits: where a single one is another, so is the sum.
    """
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    x = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    hash_ = x.astype(jnp.uint32)
    for axis in range(hash_.ndim):
        hash_ = _mix(hash_ + jax.lax.broadcasted_iota(jnp.uint32, hash_.shape, axis))
    return _mix(hash_).sum(dtype=jnp.uint32), finite


def _mix(x):
    """The finaliser of MurmurHash3, half of it."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return x ^ (x >> 13)


@jax.jit
def _digest_all(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    # One program: several would run at the same time, each with collectives of its own, in an
    # order that another process need not share.
    return {name: _digest(x) for name, x in leaves.items()}


def digests(tree: Any) -> dict[str, Digest]:
    """Of each leaf of a tree, by its path; computed where the leaf lies.

    What waits passes as finite: updates skip what is not.
    """
    groups: dict[str, dict[str, jax.Array]] = {"": {}}
    for name, x in named(tree).items():
        prefix, rest = WAITING.match(name).groups(default="")
        groups.setdefault(prefix, {})[rest] = x
    found = {}
    for prefix, leaves in groups.items():  # however many batches wait, they have one program
        for name, (checksum, ok) in jax.device_get(_digest_all(leaves)).items():
            found[prefix + name] = Digest(int(checksum), bool(ok or prefix))
    return found


def fingerprint(found: Mapping[str, Digest]) -> str:
    """All of them in 16 hexadecimal digits."""
    text = json.dumps({name: digest.checksum for name, digest in found.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lost(found: Mapping[str, Digest]) -> str:
    """The first leaf that is not finite throughout, or ""."""
    return next((name for name, digest in found.items() if not digest.finite), "")


def file_of(path: epath.Path, name: str) -> str:
    """The files below a path that hold an array, as Orbax's index there tells; else all of them."""
    import tensorstore  # of Orbax

    try:
        store = tensorstore.KvStore.open(f"{path.as_uri()}/").result()
        root = tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]
        chunks = f"{name.replace('/', '.')}/c".encode()
        entries = tensorstore.ocdbt.dump(store, root).result()["entries"]
        places = {e.get("indirect_value", root) for e in entries if e["key"].startswith(chunks)}
        # "value:ocdbt.process_0/:d/5f1c…:0:3895": a part, a file of it, an offset and a length
        return ", ".join(sorted("".join(x.split(":")[1:-2]) for x in places)) or "*"
    except (ValueError, KeyError, IndexError):  # the index may be damaged, too
        return "*"
