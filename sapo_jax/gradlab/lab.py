"""What algorithms make of the same rows, and whether that points where it should.

Algorithms, buckets of tokens and targets are all cotangents, pulled back by the same forward pass.
At most `Lab.tile` gradients (and as many of a second tile) exist at a time: they are reduced to
Gram matrices and to sketches as they come.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax import advantages, learner, objectives
from sapo_jax.gradlab.fidelity import Products, fidelities, noise_scale
from sapo_jax.gradlab.pull import Pulled, blocks_of, cotangents, gram, pull, ungated
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import OBJECTIVES, Objective
from sapo_jax.types import Batch

# The bare ratio by either average: what an algorithm is compared with, by its own average.
UNGATED = {"seq_mean": "ungated", "token_mean": "ungated_token"}
Halves = tuple[Pulled, Pulled]


def cosines(gram_KK: np.ndarray) -> np.ndarray:
    """Cosine matrix of a Gram matrix; NaN where a gradient is 0."""
    norm_K = np.sqrt(np.diag(gram_KK))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram_KK / np.outer(norm_K, norm_K)


@dataclasses.dataclass(frozen=True)
class Lab:
    """Frozen rows and fresh samples of the same prompts at one policy.

    Attributes:
      params: of the policy.
      frozen: F·G off-policy rows, the rows of a prompt adjacent, with the run's advantages.
      fresh: F·N on-policy rows of the same prompts, N even; advantages are not looked at.
      rewards: f[F·N], of the fresh rows.
      prompts: F.
      estimator: the run's advantage estimator.
      hp: the run's; its objective does not matter.
      tile: gradients that exist at a time (and as many of a second tile).
      max_rows: fresh rows of a forward pass; frozen ones pass with their group.

    Raises:
      ValueError: rows with images.
    """

    params: Any
    frozen: Batch
    fresh: Batch
    rewards: np.ndarray
    prompts: int
    estimator: str
    hp: learner.Hyperparameters
    tile: int = 16
    max_rows: int = 64

    def __post_init__(self):
        for field in ("frozen", "fresh"):
            if (images := getattr(self, field).images) is not None:
                kind = type(images).__name__
                raise ValueError(f"{field}.images={kind}: must be None: the lab is of text alone")

    def targets(self) -> Halves:
        """Three targets as loss gradients, from either half of each prompt's fresh samples.

        First the gradient of expected reward: leave-one-out advantages without standard
        deviation, summed over the sequence. Then the run's own advantages at r = 1, by seq_mean and
        by token_mean, whose direction const_len and seq_sum share.
        """
        size = len(self.rewards) // self.prompts // 2
        pieces = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= self.max_rows)
        rewards_PHN = jnp.asarray(self.rewards, jnp.float32).reshape(self.prompts, 2, size)
        rows, count = blocks_of(self.fresh, self.prompts), self.prompts * pieces
        halves = []
        for half in range(2):
            at = slice(half * size, (half + 1) * size)
            batch = jax.tree.map(lambda x, at=at: x[:, at].reshape(-1, *x.shape[2:]), rows)
            batch = batch.replace(weights=None, ref_logp=None)
            rewards_B = rewards_PHN[:, half].reshape(-1)
            own_B = advantages.ESTIMATORS[self.estimator](rewards_B, size)
            each = {
                "seq_sum": advantages.leave_one_out(rewards_B, size),
                "seq_mean": own_B,
                "token_mean": own_B,
            }
            cotangents_TBS = jnp.concatenate([
                cotangents(
                    (dataclasses.replace(OBJECTIVES["reinforce"], aggregation=aggregation),),
                    batch.old_logp, batch.replace(advantages=advantages_B),
                )
                for aggregation, advantages_B in each.items()
            ])  # fmt: skip
            blocks = blocks_of(cotangents_TBS, count, axis=1)
            pulled = pull(self.params, blocks_of(batch, count), blocks, self.hp)
            sketches = blocks_of(pulled.sketches, self.prompts).sum(1)
            halves.append(pulled.replace(sketches=sketches))
        return halves[0], halves[1]

    def tiles(self, cotangents_KBS: jax.Array, after: int = -1) -> Iterator[tuple[int, Pulled]]:
        """Gradients of the frozen rows in tiles, by one executable; with their start.

        Cotangents of zeros fill the last tile up. Only tiles that start after ``after`` are pulled.
        """
        missing = -len(cotangents_KBS) % self.tile
        padded_KBS = jnp.pad(cotangents_KBS, ((0, missing), (0, 0), (0, 0)))
        rows = blocks_of(self.frozen, self.prompts)
        for start in range(0, len(padded_KBS), self.tile):
            if start > after:
                blocks = blocks_of(padded_KBS[start : start + self.tile], self.prompts, axis=1)
                yield start, pull(self.params, rows, blocks, self.hp)

    def products(
        self, cotangents_KBS: jax.Array, halves: Halves
    ) -> tuple[Products, dict[str, np.ndarray]]:
        """Inner products of K gradients with both halves of the targets, and with each other.

        The latter by part of the model, f64[K, K]. Beyond one tile, each is compared with later
        ones that are pulled back again: memory is two tiles, whatever K is.
        """
        count, size = len(cotangents_KBS), self.tile
        width = -(-count // size) * size
        shape = (self.hp.static.model, self.hp.static.mesh)
        matrices: dict[str, np.ndarray] = {}
        with_halves, sketches, squares = ([], []), [], []
        for start, left in self.tiles(cotangents_KBS):
            later = self.tiles(cotangents_KBS, after=start)
            for other, right in itertools.chain([(start, left)], later):
                rows, columns = slice(start, start + size), slice(other, other + size)
                for part, block in jax.device_get(gram(left.grads, right.grads, *shape)).items():
                    matrix = matrices.setdefault(part, np.zeros((width, width)))
                    matrix[rows, columns], matrix[columns, rows] = block, block.T
            for column, half in zip(with_halves, halves, strict=True):
                column.append(_whole(left, half, *shape))
            sketches.append(np.asarray(left.sketches, np.float64))
            squares.append(np.asarray(left.squares, np.float64))
        matrices = {part: matrix[:count, :count] for part, matrix in matrices.items()}
        first, second = halves
        return Products(
            aa=np.diag(matrices["whole"]),
            a1=np.concatenate(with_halves[0])[:count],
            a2=np.concatenate(with_halves[1])[:count],
            h11=np.diag(_whole(first, first, *shape)),
            h22=np.diag(_whole(second, second, *shape)),
            h12=np.diag(_whole(first, second, *shape)),
            squares=np.concatenate(squares, 1)[:, :count],
            sketches=(
                np.concatenate(sketches, 1)[:, :count],
                *(np.asarray(half.sketches, np.float64) for half in halves),
            ),
        ), matrices


def _whole(x: Pulled, y: Pulled, config: ModelConfig, mesh: Mesh | None) -> np.ndarray:
    return np.asarray(gram(x.grads, y.grads, config, mesh)["whole"], np.float64)


def _listed(values: np.ndarray) -> list:
    """Nested lists for JSON, with None where a number is not finite."""
    if values.ndim > 1:
        return [_listed(row) for row in values]
    return [float(x) if np.isfinite(x) else None for x in values]


def _cotangents(lab: Lab, resolved: tuple[Objective, ...]) -> tuple[jax.Array, ...]:
    """f32[K, B, S] each: with the gates, without, and what they removed (rounding is nothing)."""
    logp_BS = learner.score(lab.params, lab.frozen, lab.hp)
    gated_KBS = cotangents(resolved, logp_BS, lab.frozen, kl=lab.hp.static.kl)
    ungated_KBS = cotangents(tuple(map(ungated, resolved)), logp_BS, lab.frozen)
    removed_KBS = ungated_KBS - gated_KBS
    rounding_KBS = 1e-6 * jnp.abs(ungated_KBS)
    return gated_KBS, ungated_KBS, jnp.where(jnp.abs(removed_KBS) > rounding_KBS, removed_KBS, 0)


def _mass(cotangents_KBS: jax.Array) -> np.ndarray:
    """Σ|u| over the tokens, f[K]."""
    return np.abs(np.asarray(cotangents_KBS)).sum((1, 2))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where the whole is 0."""
    return part / np.where(whole > 0, whole, np.nan)


def _column(objective: Objective) -> int:
    """Which of an own target's averages an objective has: 0 per sequence, 1 over tokens."""
    return 0 if objective.aggregation == "seq_mean" else 1


def compare(
    lab: Lab, halves: Halves, algorithms: Mapping[str, Objective], *, draws: int = 0
) -> dict[str, Any]:
    """Norms, cosines, fidelities, and what each gate removed, of algorithms on the same rows.

    Fidelity is cos(g, target)/√cos(half₁, half₂), see `fidelity`. ``removed`` is the gradient of
    the `ungated` objective minus that of the objective: a fidelity below 0 says that what the gate
    took away pointed the wrong way. Differences are to the bare ratio of tokens with the
    algorithm's own average.

    Args:
      lab: rows and policy.
      halves: of `Lab.targets`.
      algorithms: by name; the bare ratio is put before them, by the names of UNGATED.
      draws: see `fidelity.fidelities`.

    Returns:
      JSON-able statistics.

    Raises:
      ValueError: an objective's hyperparameter is missing.
    """
    bare = ungated(OBJECTIVES["sapo"])
    plain = {name: dataclasses.replace(bare, aggregation=a) for a, name in UNGATED.items()}
    named = {**plain, **algorithms}
    resolved = tuple(objectives.resolve(o) for o in named.values())
    gated_KBS, ungated_KBS, removed_KBS = _cotangents(lab, resolved)
    products, matrices = lab.products(gated_KBS, halves)
    removed, _ = lab.products(removed_KBS, halves)
    reference = [_column(objective) for objective in resolved]
    own = [1 + column for column in reference]
    mass_K = _share(_mass(removed_KBS), _mass(ungated_KBS))
    return {
        "names": list(named),
        "aggregation": [o.aggregation for o in resolved],
        "norm": {part: _listed(np.sqrt(np.diag(m))) for part, m in matrices.items()},
        "cosine": {part: _listed(cosines(m)) for part, m in matrices.items()},
        "fidelity": fidelities(products, own, reference, draws),
        "removed": fidelities(removed, own, reference, draws) | {"mass": _listed(mass_K)},
        "noise_scale": _listed(noise_scale(products)),
        "target_halves": _listed(products.reliability()),
    }


def compare_buckets(
    lab: Lab, halves: Halves, objective: Objective, masks: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Fidelity by bucket of tokens: of its ungated gradient, and of what the gate removed there.

    Args:
      lab: rows and policy.
      halves: of `Lab.targets`.
      objective: whose gate it is.
      masks: bool[B, S] by name, of `tokens.buckets` say; one without a gradient gets None.

    Returns:
      JSON-able: for each bucket its share of the gradient mass Σ|u|, the share of it that was
      removed, and both fidelities.
    """
    resolved = objectives.resolve(objective)
    _, ungated_KBS, removed_KBS = _cotangents(lab, (resolved,))
    names, own, total = list(masks), [1 + _column(resolved)], _mass(ungated_KBS)
    result: dict[str, Any] = {"names": names}
    for key, cotangents_KBS in (("carried", ungated_KBS), ("removed", removed_KBS)):
        whole: dict[str, list] = {"reward": [], "own": [], "mass": []}
        for start in range(0, len(names), lab.tile):  # they are not compared with each other
            masks_QBS = jnp.stack([masks[name] for name in names[start : start + lab.tile]])
            bucket_QBS = jnp.where(masks_QBS, cotangents_KBS, 0)
            count = len(bucket_QBS)
            products, _ = lab.products(bucket_QBS, halves)
            found = fidelities(products, own * count, [0] * count)
            found["mass"] = _listed(_share(_mass(bucket_QBS), total))
            whole = {name: [*values, *found[name]] for name, values in whole.items()}
        result[key] = whole
    return result
