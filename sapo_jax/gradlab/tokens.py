"""What algorithms do to single tokens: coefficients, effective samples, Var_i and D_i, logits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import diagnostics, learner, objectives
from sapo_jax.gradlab.pull import cotangents
from sapo_jax.learner.diagnostics import GATE_EDGES
from sapo_jax.model import params, transformer, vocab
from sapo_jax.objectives import OBJECTIVES, Objective
from sapo_jax.types import Batch

NEAR = (0.01, 0.05, 0.1, 0.2)  # |log r| beyond which a token counts as off-policy
LOG_RATIO_BINS = (0.0, 0.01, 0.05, 0.2, np.inf)


@jax.jit
def score(weights: Any, batch: Batch, hp: learner.Hyperparameters) -> tuple[jax.Array, jax.Array]:
    """log π and entropy of the masked tokens, f32[B, S] each."""
    return learner.map_rows(lambda *arguments: learner.forward(*arguments)[:2], weights, batch, hp)


@jax.jit
def collision(weights: Any, batch: Batch, hp: learner.Hyperparameters) -> jax.Array:
    """Σ_v π(v)² of the distribution that each masked token was drawn from, f32[B, S].

    ``hp.static.head_chunk`` tokens have logits at a time.
    """
    return learner.map_rows(_collision, weights, batch, hp)


def _collision(weights, batch, hp):
    weights = params.all_gather(weights, params.table(hp.static.model), hp.static.model)
    replay = batch.routing if hp.static.routing_replay != "none" else None
    hidden_BSD, _ = transformer.hidden(
        weights, hp.static.model, batch.tokens, batch.segments, replay_BSLk=replay
    )
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    padded_TD = jnp.pad(hidden_TD, ((0, -len(hidden_TD) % hp.static.head_chunk), (0, 0)))

    def chunk(hidden_CD):
        logits_CV = transformer.logits_of(weights, hp.static.model, hidden_CD) / hp.temperature
        return vocab.sum(jnp.exp(2 * vocab.log_softmax(logits_CV)))

    chunks = padded_TD.reshape(-1, hp.static.head_chunk, hidden_TD.shape[-1])
    square_BS = jax.lax.map(chunk, chunks).reshape(-1)[: len(hidden_TD)].reshape(batch.mask.shape)
    return jnp.where(batch.mask, jnp.pad(square_BS[:, :-1], ((0, 0), (1, 0))), 0)


def coefficients(
    objective: Objective, logp_BS: jax.Array, batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """c, the factor of A·∇log π of each token, and the ratio that the gate sees, both f[B, S].

    By differentiating the loss, without a KL penalty, and dividing by the gradient of REINFORCE
    with the same aggregation, whose c is 1. 0 where A = 0 or outside the mask.
    """
    resolved = objectives.resolve(objective, kl_coef=0.0)
    plain = dataclasses.replace(
        OBJECTIVES["reinforce"],
        aggregation=resolved.aggregation,
        hyperparameters=resolved.hyperparameters,
    )
    batch, logp_BS = batch.replace(weights=None), jnp.asarray(logp_BS)
    u_BS, one_BS = np.asarray(cotangents((resolved, plain), logp_BS, batch))
    given = (batch.old_logp, batch.advantages, batch.mask, batch.segments)
    inputs, _ = objectives.token_inputs(resolved, logp_BS, *given)
    c_BS = np.divide(u_BS, one_BS, out=np.zeros_like(u_BS), where=one_BS != 0)
    return c_BS, np.exp(np.asarray(inputs.log_ratio))


def effective(values: np.ndarray) -> float | None:
    """The effective share of a sample with these weights, (Σv)² / (n·Σv²)."""
    square = float(np.sum(values**2)) * values.size
    return float(np.sum(values)) ** 2 / square if square else None


def gate_spread(
    log_ratio_BS: np.ndarray, mask_BS: np.ndarray, tau: float
) -> list[dict[str, float]]:
    """Var_i, D_i and their bound of each row with tokens, see `diagnostics.sequences`."""
    found = diagnostics.sequences(jnp.asarray(log_ratio_BS), jnp.asarray(mask_BS), tau)
    names = ("variance", "d_log", "d_actual", "bound")
    rows = np.stack(found[1:], -1)[np.asarray(found.tokens) > 0].tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


def deciles(values_BS: np.ndarray, mask_BS: np.ndarray) -> np.ndarray:
    """The decile 0..9 of each masked value among them, i32[B, S]; ties share the lower one."""
    edges = np.quantile(values_BS[mask_BS], np.linspace(0, 1, 11)[1:-1])
    return np.searchsorted(edges, values_BS, side="left")


def buckets(
    logp_BS: np.ndarray, entropy_BS: np.ndarray, batch: Batch
) -> dict[str, dict[str, np.ndarray]]:
    """Masks of tokens, bool[B, S], by kind and name: the buckets of a kind divide up the tokens."""
    mask_BS = np.asarray(batch.mask)
    log_ratio_BS = np.abs(np.asarray(logp_BS) - np.asarray(batch.old_logp))
    sign_B = np.sign(np.asarray(batch.advantages))[:, None]
    result = {"sign": {"A > 0": mask_BS & (sign_B > 0), "A < 0": mask_BS & (sign_B < 0)}}
    bins = itertools.pairwise(LOG_RATIO_BINS)
    result["log_ratio"] = {
        (f"{low:g} to {high:g}" if np.isfinite(high) else f"over {low:g}"): mask_BS
        & (log_ratio_BS >= low)
        & (log_ratio_BS < high)
        for low, high in bins
    }
    for kind, values_BS in (("probability", np.exp(batch.old_logp)), ("entropy", entropy_BS)):
        decile_BS = deciles(np.asarray(values_BS), mask_BS)
        result[kind] = {str(d + 1): mask_BS & (decile_BS == d) for d in range(10)}
    return result


def _histograms(w: np.ndarray, c: np.ndarray, sign: np.ndarray) -> dict[str, dict[str, list]]:
    def counts(values):
        return np.histogram(np.clip(values, GATE_EDGES[0], GATE_EDGES[-1]), GATE_EDGES)[0].tolist()

    sides = {"positive": sign > 0, "negative": sign < 0}
    return {name: {"w": counts(w[s]), "c": counts(c[s])} for name, s in sides.items()}


def _logit_space(mass: np.ndarray, p: np.ndarray, square: np.ndarray, sign: np.ndarray) -> dict:
    """What an update does to logits: it moves the drawn token by |cA|(1 − π), the others by π_v.

    Negative updates push probability towards all other tokens at once: ``l2`` is the length of
    that push, |cA|·√Σ_{v≠y} π_v², ``spread`` the effective number of tokens that it goes to.
    """
    others = np.maximum(square - p**2, 1e-20)
    result = {}
    for name, side in (("positive", sign > 0), ("negative", sign < 0)):
        m, q, o = mass[side], p[side], others[side]
        weight = float(np.sum(m * (1 - q)))
        result[name] = {
            "l1": weight,
            "l2": float(np.sum(m * np.sqrt(o))),
            "spread": float(np.sum(m * (1 - q) * (1 - q) ** 2 / o)) / weight if weight else None,
        }
    return result


def describe(
    algorithms: Mapping[str, Objective], weights: Any, batch: Batch, hp: learner.Hyperparameters
) -> dict[str, Any]:
    """JSON-able statistics of the tokens of a batch at one policy.

    Args:
      algorithms: by name.
      weights: the policy.
      batch: off-policy rows with advantages.
      hp: the run's; its objective does not matter.

    Returns:
      Shares of tokens off-policy, effective samples of the ratios, Var_i and D_i of each sequence
      (with SAPO's τ_pos), and of each of ``algorithms`` what `_of_algorithm` returns.
    """
    logp_BS, entropy_BS = (np.asarray(x) for x in score(weights, batch, hp))
    mask_BS = np.asarray(batch.mask)
    log_ratio_BS = np.where(mask_BS, logp_BS - np.asarray(batch.old_logp), 0)
    square_BS = np.asarray(collision(weights, batch, hp))
    rows = [log_ratio_BS[i][mask_BS[i]] for i in range(len(mask_BS)) if mask_BS[i].any()]
    sums, means = (np.array([f(row) for row in rows]) for f in (np.sum, np.mean))
    near = np.abs(log_ratio_BS)[mask_BS]
    tau = OBJECTIVES["sapo"].hyperparameters["tau_pos"]
    return {
        "tokens": int(mask_BS.sum()),
        "sequences": gate_spread(log_ratio_BS, mask_BS, tau),
        "entropy": float(entropy_BS[mask_BS].mean()),
        "abs_log_ratio": {"mean": float(near.mean()), "max": float(near.max())},
        "off_policy": {str(d): float(np.mean(near > d)) for d in NEAR},
        "ess": {
            "token ratio r": effective(np.exp(log_ratio_BS[mask_BS])),
            "geometric mean s": effective(np.exp(means)),
            "product W": effective(np.exp(np.clip(sums, -20, 20))),
        },
        "gate_edges": GATE_EDGES.tolist(),
        "algorithms": {
            name: _of_algorithm(objective, logp_BS, log_ratio_BS, square_BS, batch)
            for name, objective in algorithms.items()
        },
    }


def _of_algorithm(
    objective: Objective,
    logp_BS: np.ndarray,
    log_ratio_BS: np.ndarray,
    square_BS: np.ndarray,
    batch: Batch,
) -> dict[str, Any]:
    """Histograms of w and c by sign(A), effective share of c, silenced tokens, off-policy mass.

    ``dropped_sequences`` is the share of sequences with a signal that count not at all, and
    ``collateral`` the share of their tokens that had hardly moved (|log r| < 0.01): GSPO drops
    on-policy tokens with their sequence.
    """
    mask_BS = np.asarray(batch.mask)
    advantages_BS = np.broadcast_to(np.asarray(batch.advantages)[:, None], mask_BS.shape)
    signal_BS = mask_BS & (advantages_BS != 0)
    c_BS, ratio_BS = coefficients(objective, logp_BS, batch)
    c, sign = c_BS[signal_BS], np.sign(advantages_BS[signal_BS])
    mass, far = np.abs(c * advantages_BS[signal_BS]), np.abs(log_ratio_BS[signal_BS])
    known_B = signal_BS.any(-1)
    dropped_B = known_B & ~np.any(c_BS != 0, -1)
    moved = np.abs(log_ratio_BS)[mask_BS & dropped_B[:, None]]
    beyond = {str(d): float(mass[far > d].sum() / max(mass.sum(), 1e-30)) for d in NEAR}
    return {
        "histograms": _histograms(c / ratio_BS[signal_BS], c, sign),
        "ess": effective(c),
        "silenced": float(np.mean(c == 0)) if c.size else None,
        "mass_off_policy": beyond,
        "dropped_sequences": float(dropped_B.sum() / max(1, known_B.sum())),
        "collateral": float(np.mean(moved < NEAR[0])) if moved.size else None,
        "logits": _logit_space(mass, np.exp(logp_BS[signal_BS]), square_BS[signal_BS], sign),
    }
