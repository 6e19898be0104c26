"""How well gradients point where they should, with bootstrap intervals over prompts.

Two halves h₁, h₂ of the fresh samples give two noisy copies of a target direction. The cosine of a
gradient g with one of them is too small by the target's noise, √cos(h₁, h₂), which is divided out:

    fidelity = ½ [cos(g, h₁) + cos(g, h₂)] / √cos(h₁, h₂)

1 says that g is the target's direction; the sampling noise of g itself stays in. The bootstrap
draws prompts with replacement, in g and in the targets alike; it works on sketches of each prompt's
gradient, whose inner products err by about 1% of the norms, and shifts to the exact value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sapo_jax.training import bootstrap

RESAMPLES = 400


@dataclasses.dataclass(frozen=True)
class Products:
    """Inner products of K gradients a with both halves of T targets.

    Attributes:
      aa: f64[K], ‖a‖².
      a1, a2: f64[K, T], ⟨a, h₁⟩ and ⟨a, h₂⟩.
      h11, h22, h12: f64[T], of the halves.
      squares: f64[F, K], ‖a_p‖² of each prompt's part of a.
      sketches: of a [F, K, D], h₁ and h₂ [F, T, D].
    """

    aa: np.ndarray
    a1: np.ndarray
    a2: np.ndarray
    h11: np.ndarray
    h22: np.ndarray
    h12: np.ndarray
    squares: np.ndarray
    sketches: tuple[np.ndarray, np.ndarray, np.ndarray]

    def reliability(self) -> np.ndarray:
        """cos(h₁, h₂) of each target, f64[T]: 1 where the fresh samples leave no noise."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.h12 / np.sqrt(self.h11 * self.h22)


def _fidelity(aa, a1, a2, h11, h22, h12) -> np.ndarray:
    """[..., K, T]; NaN where the gradient is 0, or the halves of the target disagree."""
    with np.errstate(invalid="ignore", divide="ignore"):
        reliability = h12 / np.sqrt(h11 * h22)
        first, second = a1 / np.sqrt(h11)[..., None, :], a2 / np.sqrt(h22)[..., None, :]
        return (first + second) / 2 / np.sqrt(aa)[..., None] / np.sqrt(reliability)[..., None, :]


def _resampled(products: Products, draws_RF: np.ndarray) -> np.ndarray:
    """Fidelities of resampled prompts, [R, K, T], from the sketches."""
    a, h1, h2 = products.sketches

    def form(x, y):
        """Σ_pq w_p w_q ⟨x_p, y_q⟩ of each pair of vectors, by way of matrices over prompts."""
        pairs = np.einsum("pkd,qkd->kpq", x, y, optimize=True)
        return np.einsum("rp,kpq,rq->rk", draws_RF, pairs, draws_RF, optimize=True)

    def cross(h):
        pairs = np.einsum("pkd,qtd->ktpq", a, h, optimize=True)
        return np.einsum("rp,ktpq,rq->rkt", draws_RF, pairs, draws_RF, optimize=True)

    same = form(a, a), cross(h1), cross(h2)
    return _fidelity(*same, form(h1, h1), form(h2, h2), form(h1, h2))


def fidelities(
    products: Products, own: Sequence[int], reference: Sequence[int], draws: int = 0
) -> dict[str, Any]:
    """Fidelities to the expected reward and to each algorithm's own target, with 95% intervals.

    Args:
      products: of K gradients with T targets, the first of which is the expected reward's.
      own: the target of each gradient's own aggregation and advantages.
      reference: for each gradient, the one that its ``difference`` is taken to.
      draws: of the bootstrap that are given, too, so that several labs can be pooled.

    Returns:
      For ``reward`` and ``own``: K entries of ``value``, ``low``, ``high``, and ``difference``
      with the same; None where a number does not exist.
    """
    point_KT = _fidelity(*(getattr(products, k) for k in ("aa", "a1", "a2", "h11", "h22", "h12")))
    prompts = len(products.squares)
    draws_RF = bootstrap.counts(prompts, RESAMPLES)
    whole = _resampled(products, np.ones((1, prompts)))[0]
    shift_RKT = _resampled(products, draws_RF.astype(float)) - whole
    rows, interval = np.arange(len(own)), partial(_interval, draws=draws)
    result = {}
    for key, column in (("reward", np.zeros(len(own), int)), ("own", np.asarray(own))):
        point_K, shift_RK = point_KT[rows, column], shift_RKT[:, rows, column]
        base_K, moved_RK = point_KT[reference, column], shift_RKT[:, reference, column]
        result[key] = [
            interval(point_K[k], shift_RK[:, k])
            | {"difference": interval(point_K[k] - base_K[k], shift_RK[:, k] - moved_RK[:, k])}
            for k in rows
        ]
    return result


def _interval(point: float, shifts_R: np.ndarray, draws: int) -> dict[str, Any]:
    finite = shifts_R[np.isfinite(shifts_R)]
    if not np.isfinite(point) or len(finite) < RESAMPLES // 2:
        return {"value": None, "low": None, "high": None}
    low, high = bootstrap.percentiles(point + finite)
    some = {"draws": (point + finite[:draws]).tolist()} if draws else {}
    return {"value": float(point), "low": low, "high": high, **some}


def noise_scale(products: Products) -> np.ndarray:
    """The gradient noise scale tr(Σ)/‖G‖² of each gradient in prompts, f64[K].

    Both from the spread of the prompts' gradients, unbiased: a batch of that many prompts has as
    much noise as signal. Source: arXiv 1812.06162, appendix A. NaN where ‖G‖² comes out ≤ 0: the
    prompts at hand do not show a direction.
    """
    prompts = len(products.squares)
    mean_square_K, of_mean_K = prompts * products.squares.sum(0), products.aa
    # a = Σ_p a_p: in units of ‖a‖², E‖a_p·F‖² = F·Σ‖a_p‖².
    trace_K = (mean_square_K - of_mean_K) * prompts / (prompts - 1)
    signal_K = of_mean_K - trace_K / prompts
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(signal_K > 0, trace_K / signal_K, np.nan)
